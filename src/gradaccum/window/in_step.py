"""The plain runner among processes of which every forward waits for all: equally many micro-batches on each.

How many is agreed on when the window is opened. A process with fewer, or with an empty share, runs fillers: a
micro-batch it has had, of this batch or an earlier one, or the share of zero rows itself. A filler's loss is not used,
its backward starts with gradients of zero at the model's outputs, and buffers are put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError
from gradaccum.types import Rows
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.runner import Runner
from gradaccum.window.snapshot import Buffers


class Fillers:
    """What a process runs while others have micro-batches of their own, and it has none left."""

    def __init__(self) -> None:
        self._kept: Any = None

    def keep(self, batch: Any) -> None:
        """Takes one row of a batch, if it has any."""
        if tree.rows(batch):
            self._kept = tree.map_leaves(tree.take(batch, slice(0, 1)), _kept)

    def run(
        self, run_one: Callable[[Any], Any], batch: Any, accumulation: Accumulation, *, then: Callable[[], None]
    ) -> None:
        """Runs a filler, and puts buffers back.

        Args:
            run_one: on a micro-batch on the device.
            batch: of which there is no row to keep, where none has been kept.
            accumulation: whose models run.
            then: what the others wait for; called before buffers are put back.

        Raises:
            BatchError: there never was a row, and the model cannot run on none.
        """
        filler = tree.to_device(batch if self._kept is None else self._kept, accumulation.device())
        buffers = Buffers.of(accumulation.models)
        try:
            run_one(filler)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
            if tree.rows(filler):
                raise
            raise BatchError(
                "This process has no samples in its first batch, other processes have, and FSDP2 makes every "
                f"forward wait for all of them; but the model cannot run on zero rows ({type(error).__name__}: "
                f"{error}). Give every process at least one sample of the first batch."
            ) from error
        then()
        buffers.restore()


@dataclass(kw_only=True)
class InStep:
    """Runs micro-batches one after another, and then fillers.

    Attributes:
        runner: runs those of this process.
        loss_of: from a micro-batch on the device to its loss.
        fillers: of this process.
    """

    runner: Runner
    loss_of: Callable[[Any], Any]
    fillers: Fillers = field(default_factory=Fillers)

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
        self.fillers.keep(batch)
        for index in range(len(pieces), count):
            ranks.prepare(is_last=index + 1 == count)
            self.fillers.run(self.loss_of, batch, accumulation, then=ranks.backward_of_nothing)


def _kept(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf  # not a view, which would keep the whole batch
