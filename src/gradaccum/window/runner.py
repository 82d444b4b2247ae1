"""The seam between the whole batch in hand and how its micro-batches are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gradaccum.types import Rows
from gradaccum.window.accumulation import Accumulation


class Runner(Protocol):
    """Runs the micro-batches of one batch after another."""

    def run(
        self, accumulation: Accumulation, batch: Any, pieces: Sequence[Rows], *, ran: Callable[[int], None]
    ) -> None:
        """Adds the gradients of one batch's micro-batches to the open window, and counts them.

        Args:
            accumulation: its window is open, and stays open. Where this raises, the caller discards it.
            batch: the whole batch, where the user keeps it.
            pieces: the rows of each micro-batch, in the order they run.
            ran: told after each micro-batch how many have run.
        """
        ...
