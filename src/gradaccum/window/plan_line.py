"""The line that says before training what will run, and the warning of layers that see the micro-batch."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.errors import BatchNormWarning
from gradaccum.window.guards import user_stack_level
from gradaccum.window.over_ranks import OverRanks

logger = logging.getLogger("gradaccum")
_MAX_SHOWN = 3
NOT_CHECKED = "not checked"
NOTHING_IS_CUT = f"{NOT_CHECKED}: one micro-batch, nothing is cut"
"""What the plan line says of a gradient that nobody has looked at."""


class PlanLine:
    """Logs the plan line and gives the warning, each once, before the first window that they are about.

    ``couples_batch_norms`` says whether BatchNorm in training mode sees single micro-batches.

    Attributes:
        evidence: what is known of the gradient: "exact", and by what it was checked; or what was not checked, and why.
        also: what else is said of every window.
        waits: whether there is a line for `tell`, which waits until a loss has been read.
    """

    def __init__(self, models: Sequence[nn.Module], ranks: OverRanks | None, *, couples_batch_norms: bool) -> None:
        self._models, self._ranks = models, ranks
        self._couples_batch_norms = couples_batch_norms
        self._is_logged = self._has_seen_split = False
        self.evidence = NOT_CHECKED
        self.waits = False
        self._line: Callable[[str], str] = str
        self.also: Sequence[str] = ()

    def coupled_layers(self) -> list[str]:
        """Qualified names of the layers that see the micro-batch."""
        return coupled_batch_norms(self._models) if self._couples_batch_norms else []

    def is_due(self, sizes: Sequence[int | None]) -> bool:
        """Whether there is anything to say before a window of these sizes that has not been said."""
        return bool(sizes) and not (self._is_logged and (self._has_seen_split or len(sizes) == 1))

    def announce(
        self,
        sizes: Sequence[int | None],
        *,
        updates_per_epoch: int | None = None,
        is_final: bool = True,
        reads_loss: bool = False,
    ) -> None:
        """Logs the plan line, on one of several processes, and warns of layers that see the micro-batch.

        With ``is_final`` later windows will be cut like this one, of these sizes in rows; the line waits for that. With
        ``reads_loss`` it waits for `tell` besides.
        """
        is_split = len(sizes) > 1
        if not self.is_due(sizes) or not (is_final or (is_split and not self._has_seen_split)):
            return
        coupled = self.coupled_layers()
        if is_final and not self._is_logged and (self._ranks is None or self._ranks.is_first):
            over = None if self._ranks is None else self._ranks.description
            self._line = functools.partial(
                self._line_of, sizes, len(coupled) if is_split else 0, updates_per_epoch=updates_per_epoch, ranks=over
            )
            self.waits = True
            if not reads_loss:
                self.tell()
        is_told = is_split
        if self._ranks is not None:  # all see the same layers, and a process's share is a micro-batch at least
            is_told = is_split or any(not isinstance(module, nn.SyncBatchNorm) for module in self._batch_norms())
        if coupled and is_told and (self._ranks is None or self._ranks.is_first):
            warn_of_batch_norms(
                coupled, micro_batches=len(sizes), processes=1 if self._ranks is None else self._ranks.ranks.size
            )
        self._is_logged = self._is_logged or is_final
        self._has_seen_split = is_told

    def _batch_norms(self) -> list[nn.Module]:
        return [one for model in self._models for one in model.modules() if isinstance(one, _BatchNorm)]

    def tell(self, evidence: str = "") -> None:
        """Logs the line that waits, with what is known by now."""
        self.evidence = evidence or self.evidence
        self.waits = False
        logger.info(" | ".join([self._line(self.evidence), *self.also]))

    @staticmethod
    def _line_of(sizes: Sequence[int | None], coupled_layers: int, evidence: str, **rest: Any) -> str:
        if coupled_layers:
            layers = f"{coupled_layers} BatchNorm layer{'s see' if coupled_layers != 1 else ' sees'} the micro-batch"
            evidence = f"not exact: {layers}" + (f", the rest {evidence}" if evidence != NOT_CHECKED else "")
        return plan_line(sizes, evidence=evidence, **rest)


def exact_on(sizes: Sequence[int]) -> str:
    """The evidence of a look: pieces of so many samples made the gradient that they have together."""
    return f"exact (checked on {' + '.join(map(str, sizes))} samples)"


def plan_line(
    sizes: Sequence[int | None], *, evidence: str, updates_per_epoch: int | None, ranks: str | None = None
) -> str:
    """What one update is made of, and what is known of it.

    ``batch 256 = 16 micro-batches x 16 | exact (checked on 5 + 3 samples) | 391 updates an epoch``

    Args:
        sizes: rows of each micro-batch of a window; None where they cannot be seen.
        evidence: see `PlanLine`.
        updates_per_epoch: None where the length of an epoch is unknown.
        ranks: how many processes add up what, where there are several; sizes are then those of one.
    """
    count = f"{len(sizes)} micro-batch{'es' if len(sizes) > 1 else ''}"
    known = [size for size in sizes if size is not None]
    what = "batch" if ranks is None else "share"  # of the first process; a batch is that of all
    if len(known) < len(sizes):
        batch = count
    elif min(known) == max(known):
        batch = f"{what} {sum(known)} = {count} x {known[0]}"
    else:
        batch = f"{what} {sum(known)} = {count} of {min(known)} to {max(known)}"
    parts = [batch, evidence] if ranks is None else [batch, ranks, evidence]
    if updates_per_epoch is not None:
        parts.append(f"{updates_per_epoch} update{'s' if updates_per_epoch != 1 else ''} an epoch")
    return " | ".join(parts)


def coupled_batch_norms(models: Sequence[nn.Module]) -> list[str]:
    """Qualified names of the BatchNorm layers that would normalise with the micro-batch's own statistics."""
    return [
        name or type(module).__name__
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


def warn_of_batch_norms(names: Sequence[str], *, micro_batches: int, processes: int = 1) -> None:
    """Says which layers make the gradient another than the whole batch's."""
    each = f"each of the {micro_batches} micro-batches"
    if processes > 1:
        each = f"each micro-batch ({micro_batches} here, and those of {processes - 1} more processes)"
    shown = ", ".join(names[:_MAX_SHOWN]) + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
    warnings.warn(
        f"{len(names)} BatchNorm layer{'s' if len(names) > 1 else ''} in training mode ({shown}) will normalise "
        f"{each} with its own statistics, not the batch's, so the gradient is not the whole batch's, and running "
        f"statistics advance {micro_batches} time{'s' if micro_batches > 1 else ''} an update. With ga.TrainStep: "
        'batch_norm="exact" takes the whole batch\'s statistics, "frozen" the running ones (for fine-tuning), '
        "ga.GhostBatch(n) those of fixed groups. Otherwise freeze them (module.eval()), or use GroupNorm or LayerNorm.",
        BatchNormWarning,
        stacklevel=user_stack_level(),
    )
