"""Which runner the options for layers over the batch ask for: BatchNorm's statistics, lockstep.

What does it is imported when it is asked for: whoever trains without does not wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from gradaccum.errors import LossError, WindowError
from gradaccum.split.by_samples import split_by_groups, split_by_samples
from gradaccum.types import Activations, GhostBatch, Rows, Split
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.runner import Runner
from gradaccum.window.weights import WeightsFunction

BatchNorm = Literal["micro", "exact", "frozen"] | GhostBatch

ADVICE = (
    "In lockstep the activations of all micro-batches are kept, so smaller micro-batches save little. What can help "
    'first: activations="host" (they wait in host memory) or "recompute" (blocks run again in the backward); '
    'batch_norm="frozen" or ga.GhostBatch(n) need no lockstep.'
)
"""What to do where not even a single sample fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What `TrainStep` was told about layers over the batch; checked.

    Attributes:
        batch_norm: what BatchNorm's statistics are taken over.
        lockstep: whether the user wants lockstep, whatever BatchNorm needs.
        activations: where what the backward needs waits for it, in lockstep.
    """

    batch_norm: BatchNorm
    lockstep: bool
    activations: Activations

    def __post_init__(self) -> None:
        if self.batch_norm not in ("micro", "exact", "frozen") and not isinstance(self.batch_norm, GhostBatch):
            raise WindowError(
                f"batch_norm={self.batch_norm!r}: it says what BatchNorm's statistics are taken over, the whole batch "
                '("exact"), the running ones ("frozen"), groups of n samples (ga.GhostBatch(n)), or each micro-batch '
                '("micro"), which is not the whole batch\'s gradient.'
            )
        if self.activations not in get_args(Activations):
            raise WindowError(
                f"activations={self.activations!r}: in lockstep, what the backward needs waits for it on the device "
                '("device"), in host memory ("host"), or is computed again ("recompute"). The gradient is the same.'
            )
        if self.activations != "device" and not self.is_lockstep:
            raise WindowError(
                f"activations={self.activations!r} says where the activations of all micro-batches wait in lockstep, "
                f"and with batch_norm={self.batch_norm!r} one micro-batch runs after another. Leave it out, or pass "
                'batch_norm="exact" or lockstep=True.'
            )

    @property
    def is_lockstep(self) -> bool:
        """Whether the micro-batches of a batch run side by side."""
        return self.lockstep or self.batch_norm == "exact"

    def split(self, split: Split | None, *, max_rows: int | None) -> Split:
        """How a batch is cut.

        Raises:
            WindowError: groups cannot be kept together.
        """
        if not isinstance(self.batch_norm, GhostBatch):
            return split_by_samples() if split is None else split
        if split is not None and type(split) is not type(split_by_samples()):
            raise WindowError(
                f"{self.batch_norm!r} takes BatchNorm's statistics over consecutive samples of the batch, and split= "
                'packs them otherwise: groups would be cut apart. Leave split= out, or use batch_norm="exact".'
            )
        if max_rows is not None and max_rows < self.batch_norm.samples:
            raise WindowError(
                f"micro_batch_size={max_rows} is less than the groups of {self.batch_norm!r}, whose statistics are "
                f"taken over {self.batch_norm.samples} samples at once. Pass micro_batch_size="
                f"{self.batch_norm.samples} or more, or smaller groups."
            )
        return split_by_groups(self.batch_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRunner:
    """What the options for the loss ask for.

    Attributes:
        run_one: from a micro-batch on the device to its loss, or to its outputs.
        make: from such a function to the runner that needs no lockstep.
        batch_loss: from all outputs and the batch to the loss; None where each micro-batch has one.
        sums: whether outputs are added up.
        keeps_graphs: whether the user has said how many graphs are kept.
    """

    run_one: Callable[[Any], Any]
    make: Callable[[Callable[[Any], Any]], Runner]
    batch_loss: Callable[[Any, Any], Any] | None = None
    sums: bool = False
    keeps_graphs: bool = False


def over_layers(
    loss: LossRunner,
    options: LayerOptions,
    models: Sequence[nn.Module],
    *,
    split: Split,
    weights: WeightsFunction | None,
) -> Runner:
    """The runner for a loss, with what its layers see.

    Raises:
        LossError: ``kept_graphs`` in lockstep.
    """
    run_one, make = loss.run_one, loss.make
    held: Callable[[], AbstractContextManager[None]] | None = None
    if isinstance(options.batch_norm, GhostBatch):
        from gradaccum.whole_batch.batch_norm.ghost import Ghosts

        ghosts = Ghosts(models, options.batch_norm, is_replayed=loss.batch_loss is not None)
        run_one, held = ghosts.forward(run_one), ghosts.held
    elif options.batch_norm == "frozen":
        from gradaccum.whole_batch.batch_norm.frozen import frozen

        held = functools.partial(frozen, models)
    runner: Runner
    if options.is_lockstep:
        if loss.keeps_graphs:
            raise LossError(
                "kept_graphs= says how many micro-batches' graphs are kept, and in lockstep all of them are. Leave "
                'it out; activations="host" or "recompute" say where they are kept.'
            )
        from gradaccum.whole_batch.lockstep.lockstep import Lockstep

        runner = Lockstep(
            models=models,
            run_one=run_one,
            batch_loss=loss.batch_loss,
            sums=loss.sums,
            whole=make,
            split=split,
            weights=weights,
            is_exact=options.batch_norm == "exact",
            activations=options.activations,
        )
    else:
        runner = make(run_one)
    if held is None:
        return runner
    is_ghost = isinstance(options.batch_norm, GhostBatch)
    return _Held(runner=runner, held=held, models=models, sees_calls=is_ghost)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A runner under a state that is held for each batch.

    Attributes:
        runner: what runs it.
        held: makes the state.
        models: whose layers it is for.
        sees_calls: whether it has to see every call of a layer.
    """

    runner: Runner
    held: Callable[[], AbstractContextManager[None]]
    models: Sequence[nn.Module]
    sees_calls: bool

    def run(
        self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Callable[[int], None]
    ) -> None:
        """See `Runner`."""
        if self.sees_calls:
            from gradaccum.whole_batch.batch_norm.find import refuse_compiled, refuse_synchronised

            refuse_compiled(self.models, wanted="ga.GhostBatch")
            refuse_synchronised(self.models)
        with self.held():
            self.runner.run(accumulation, batch, pieces, ran=ran)
