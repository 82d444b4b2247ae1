"""How large a window is: in micro-batches or in samples, fixed or by a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradaccum.errors import UnsupportedError, WindowError

Schedule = int | Callable[[int], int]
"""A size, or a function from the update it is for (1, 2, ...) to a size."""


class Expected(NamedTuple):
    """The micro-batches that a window will be made of.

    Attributes:
        sizes: rows of each; None where they cannot be seen.
        samples: of those that can be seen, in all.
    """

    sizes: Sequence[int | None]
    samples: int


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
                f"batch_size={self.batch_size} and micro_batches={self.micro_batches}: the one follows from the other "
                "and from the loader's micro-batches. Pass exactly one: batch_size=, the number of samples of an "
                "update, or micro_batches=, how many of the loader's items make one."
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

    def expected(self, samples: int | None, *, target: int) -> Expected:
        """The micro-batches of a window, if all are like the first.

        ``samples`` are the rows of the first, None where they cannot be seen; ``target`` is the window's size.
        """
        if not self.counts_samples:
            return Expected([samples] * target, (samples or 0) * target)
        if not samples or samples > target:
            return Expected([samples], samples or 0)
        full, rest = divmod(target, samples)
        return Expected([samples] * full + ([rest] if rest else []), target)

    def updates_in(self, length: int | None, per_window: int, *, only_complete: bool) -> int | None:
        """Windows in a pass of ``length`` micro-batches; None where that is unknown or the size changes."""
        if length is None or not self.is_fixed:
            return None
        return length // per_window if only_complete else -(-length // per_window)

    def check_fits(self, samples: int, *, before: int, target: int) -> None:
        """Checks that a micro-batch does not make the window larger than it should be.

        Raises:
            WindowError: it does.
        """
        if before + samples <= target:
            return
        if before == 0:
            raise WindowError(
                f"A micro-batch of {samples} samples is larger than batch_size={target}. It cannot be a part of a "
                "smaller batch. Let the loader yield smaller ones, or cut whole batches with ga.TrainStep."
            )
        raise WindowError(
            f"The micro-batches do not add up to batch_size={target}: there were {before} samples, and the next "
            f"micro-batch has {samples}. The update would be of {before + samples} samples, not {target}. Let the "
            f"loader's batch size divide {target}, or pass micro_batches=."
        )

    def check_length(self, length: int | None) -> None:
        """Checks, where only complete windows are applied, that a pass of so many micro-batches has one.

        Raises:
            WindowError: it has none.
        """
        if length and not self.counts_samples and self.is_fixed and length < self.at(1):
            raise self.too_short(length, target=self.at(1))

    def too_short(self, micro_batches: int, *, target: int, samples: int | None = None) -> WindowError:
        """The error for a pass in which no window is ever complete."""
        rows = "" if samples is None else f" ({samples} samples)"
        asked = f"{'batch_size' if self.counts_samples else 'micro_batches'}={target}"
        return WindowError(
            f'The pass has {micro_batches} micro-batches{rows}, and with {asked} and tail="drop" no window is ever '
            'complete: no update would be made. Use tail="step" or "carry", or a smaller window.'
        )

    @property
    def _schedule(self) -> Schedule:
        schedule = self.batch_size if self.micro_batches is None else self.micro_batches
        assert schedule is not None, "checked at construction"
        return schedule


def check_tail(tail: str, *, has_weights: bool) -> None:
    """Checks what is to become of an incomplete last window; with weights, totals are counted before it begins.

    Raises:
        WindowError: there is none.
        UnsupportedError: the window would go on in the next pass, and its totals could not be counted.
    """
    if tail not in ("step", "drop", "carry"):
        raise WindowError(
            f'tail={tail!r}: an incomplete last window can be applied with its true weight (tail="step"), thrown '
            'away ("drop"), or continued by the next pass ("carry").'
        )
    if has_weights and tail == "carry":
        raise UnsupportedError(
            'weights= with tail="carry": the totals of a window must be known before its first backward, and a '
            'part of it would be in the next pass. Use tail="step" or "drop".'
        )
