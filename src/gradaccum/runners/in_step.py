"""The plain runner among processes of which every forward waits for all: equally many micro-batches on each.

How many is agreed on when the window is opened. A process with fewer, or with an empty share, runs fillers: a
micro-batch it has had, of this batch or an earlier one, or the share of zero rows itself. A filler's loss is not used,
its backward starts with gradients of zero at the model's outputs, and buffers are put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError
from gradaccum.runners.accumulation import Accumulation
from gradaccum.runners.over_ranks import OverRanks
from gradaccum.runners.runner import Runner
from gradaccum.types import Rows


@dataclass(kw_only=True)
class InStep:
    """Runs micro-batches one after another, and then fillers.

    Attributes:
        runner: runs those of this process.
        loss_of: from a micro-batch on the device to its loss.
        filler: one row of a batch that this process has had, on the device.
    """

    runner: Runner
    loss_of: Callable[[Any], Any]
    filler: Any = field(default=None)

    def run(
        self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Callable[[int], None]
    ) -> None:
        """See `Runner`."""
        ranks = accumulation.ranks
        assert ranks is not None, "micro-batches run in step with those of other processes"
        count = ranks.pieces
        ranks.prepare(is_last=count == 1)

        def has_run(done: int) -> None:
            ran(done)
            ranks.prepare(is_last=done + 1 == count)

        self.runner.run(accumulation, batch, pieces, ran=has_run)
        if tree.rows(batch):
            self.filler = tree.map_leaves(tree.take(batch, slice(0, 1)), _kept)
        if len(pieces) < count:
            self._run_fillers(accumulation, ranks, batch, first=len(pieces), count=count)

    def _run_fillers(self, accumulation: Accumulation, ranks: OverRanks, batch: Any, *, first: int, count: int) -> None:
        filler = tree.to_device(batch if self.filler is None else self.filler, accumulation.device())
        buffers = [buffer for model in accumulation.models for buffer in model.buffers()]
        before = [buffer.clone() for buffer in buffers]
        for index in range(first, count):
            ranks.prepare(is_last=index + 1 == count)
            try:
                self.loss_of(filler)
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
                if tree.rows(filler):
                    raise
                raise BatchError(
                    "This process has no samples in its first batch, other processes have, and FSDP2 makes every "
                    f"forward wait for all of them; but the model cannot run on zero rows ({type(error).__name__}: "
                    f"{error}). Give every process at least one sample of the first batch."
                ) from error
            ranks.backward_of_nothing()
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _kept(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf  # not a view, which would keep the whole batch
