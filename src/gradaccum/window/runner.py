"""How the micro-batches of a batch in hand are run: the seam, and the plain way, one graph alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradaccum.split.asked import samples_in
from gradaccum.types import Rows, Split
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.prefetch import on_device
from gradaccum.window.weights import WeightsFunction, weights_by_name

Ran = Callable[[int], None]
"""Called after each micro-batch, with how many have run."""


class Runner(Protocol):
    """Runs the micro-batches of one batch after another."""

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """Adds the gradients of one batch's micro-batches to the open window, and counts them.

        Args:
            accumulation: its window is open, and stays open. Where this raises, the caller discards it.
            batch: the whole batch, where the user keeps it.
            pieces: the rows of each micro-batch, in the order they run.
            ran: see `Ran`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Runs micro-batches one after another: each one's forward, its loss, its backward.

    Attributes:
        loss_of: from a micro-batch on the device to its loss.
        split: cuts batches.
        weights: counts what each plain mean is over; None for samples.
    """

    loss_of: Callable[[Any], Any]
    split: Split
    weights: WeightsFunction | None

    def run(self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Ran) -> None:
        """See `Runner`."""
        micro_batches = (self.split.cut(batch, piece) for piece in pieces)
        for done, micro_batch in enumerate(on_device(micro_batches, accumulation.device()), start=1):
            weights = None if self.weights is None else weights_by_name(self.weights(micro_batch))
            samples = samples_in(self.split, batch, pieces[done - 1])
            accumulation.add(self.loss_of(micro_batch), samples=samples, weights=weights)
            ran(done)
