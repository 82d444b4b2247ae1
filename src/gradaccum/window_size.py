"""How large a window is: in micro-batches or in samples, fixed or by a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradaccum.errors import WindowError

Schedule = int | Callable[[int], int]
"""A size, or a function from the update it is for (1, 2, ...) to a size."""


@dataclass(frozen=True, slots=True)
class WindowSize:
    """Exactly one of ``micro_batches`` and ``batch_size``.

    Raises:
        WindowError: both, neither, or below 1.
    """

    micro_batches: Schedule | None = None
    batch_size: Schedule | None = None

    def __post_init__(self) -> None:
        if (self.micro_batches is None) == (self.batch_size is None):
            raise WindowError(
                f"batch_size={self.batch_size} and micro_batches={self.micro_batches}: the one follows from the other and "
                "from the loader's micro-batches. Pass exactly one: batch_size=, the number of samples of an update, "
                "or micro_batches=, how many of the loader's items make one."
            )
        if not callable(self._schedule):
            self.at(1)

    @property
    def counts_samples(self) -> bool:
        """Whether windows are measured in samples, not in micro-batches."""
        return self.batch_size is not None

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same for every update."""
        return not callable(self._schedule)

    def at(self, update: int) -> int:
        """The size of the window of the given update (1 for the first)."""
        size = self._schedule(update) if callable(self._schedule) else self._schedule
        name = "batch_size" if self.counts_samples else "micro_batches"
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WindowError(
                f"{name} is {size!r} for update {update}: a window holds a whole number of "
                f"{'samples' if self.counts_samples else 'micro-batches'}, at least 1."
            )
        return size

    @property
    def _schedule(self) -> Schedule:
        schedule = self.batch_size if self.micro_batches is None else self.micro_batches
        assert schedule is not None, "checked at construction"
        return schedule
