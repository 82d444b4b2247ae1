"""One model of what a micro-batch takes, over its size: bytes and seconds, from a few sizes at which they are known.

Bytes. At each moment of a micro-batch the bytes alive are affine in its size n: a fixed part, plus so much a sample.
The peak is the largest over all moments, a maximum of affine functions: convex, and straight from some size on. For
large models that is from the first sample on, and two sizes give the rest; small ones may take their peak in another
layer when the size grows. Between two sizes that are known the straight line is exact or too high, never too low;
beyond the last one the slope goes on.

Seconds. A size is judged by the median of its times for one row, without the first one: that pays for warming up, and
is taken only where there is no other. The least time, which is what one takes of a machine that is otherwise idle,
would let a single lucky one win that no later time can correct. Nothing is interpolated: time has steps (tiles of a
kernel, sizes of a cache) where memory has none.

`plan` fills the model ahead, from micro-batches that it runs for that alone; ``micro_batch_size="auto"`` while it
trains (`size_search`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes at their peak over the micro-batch size. A point is a size with its bytes."""

    points: tuple[tuple[int, int], ...]  # one at least, while gradients of other micro-batches wait
    whole: tuple[int, int] | None = None  # the batch's size, and what it takes in one piece
    floor: int = 0  # bytes that an update takes at any size

    @staticmethod
    def through(peaks: Mapping[int, int], *, whole: tuple[int, int] | None = None, floor: int = 0) -> Curve:
        """The curve through what was seen.

        A size that took less than a smaller one, as allocators have it at times, is given the smaller one's bytes.
        """
        points: list[tuple[int, int]] = []
        for size in sorted(peaks):
            points.append((size, max(peaks[size], points[-1][1] if points else 0)))
        return Curve(tuple(points), whole, floor)

    @property
    def bytes_per_sample(self) -> float:
        """What one more sample takes, in large micro-batches: the slope over the upper half."""
        last = self.points[-1]
        lower = [point for point in self.points if 2 * point[0] <= last[0]] or list(self.points[:-1])
        return _slope(lower[-1], last) if lower else 0.0

    @property
    def fixed_bytes(self) -> float:
        """What the straight line of large micro-batches has at size 0."""
        size, peak = self.points[-1]
        return peak - size * self.bytes_per_sample

    def at(self, size: int) -> int:
        """Bytes at their peak; from the batch's own size on, in one piece."""
        if self.whole is not None and size >= self.whole[0]:
            return max(self.floor, round(self.whole[1] + (size - self.whole[0]) * self.bytes_per_sample))
        return max(self.floor, round(self._accumulating(size)))

    def largest(self, memory: int, rows: int) -> int | None:
        """The largest size up to ``rows`` that takes at most so much memory; None where no size does."""
        if self.at(rows) <= memory:
            return rows  # in one piece it may take less than a smaller size does
        return bisect_right(range(1, rows), memory, key=self.at) or None

    def _accumulating(self, size: int) -> float:
        for left, right in pairwise(self.points):
            if size <= right[0]:
                return left[1] + (size - left[0]) * _slope(left, right)
        last_size, peak = self.points[-1]
        return peak + (size - last_size) * self.bytes_per_sample  # which is 0 where there is one point only


def _slope(left: tuple[int, int], right: tuple[int, int]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


@dataclass(slots=True)
class Times:
    """All times for one row, in seconds, by the size of the micro-batch."""

    of_size: dict[int, list[float]] = field(default_factory=dict)

    def add(self, size: int, seconds: float) -> None:
        """Adds the seconds of a micro-batch of ``size`` rows."""
        self.of_size.setdefault(size, []).append(seconds / size)

    def seconds(self) -> dict[int, float]:
        """What a row takes, by size."""
        return {size: median(times[1:] or times) for size, times in self.of_size.items()}

    def fastest(self, *, within: float = 1.0) -> list[int]:
        """The sizes that take at most ``within`` times as long as the fastest, that one first."""
        seconds = self.seconds()
        least = min(seconds.values())
        return sorted((size for size in seconds if seconds[size] <= within * least), key=seconds.__getitem__)


def median(times: Sequence[float]) -> float:
    """The middle one, or the mean of the two there."""
    # The one of `statistics` brings in `decimal` and `fractions`: 5 ms more for `import gradaccum`.
    ascending = sorted(times)
    middle = len(ascending) // 2
    return (ascending[middle] + ascending[-1 - middle]) / 2


@dataclass(slots=True, kw_only=True)
class SizeModel:
    """What is known of the micro-batches of a batch of ``rows`` samples, in bytes and seconds."""

    rows: int
    sizes: list[int]  # that the user is told about
    looks_between: bool = False  # whether the largest size that fits is added to these
    memory: int | None = None  # the budget in bytes; None where there is no limit but the device's own
    parameters: int = 0
    buffers: int = 0
    optimizer_state: int = 0
    optimizer_step: int = 0  # what a step takes besides gradients and what is resident
    inputs: int = 0  # what the batch takes while no micro-batch runs
    gradient_bytes: int = 0  # what waits between micro-batches
    peaks: dict[int, int] = field(default_factory=dict)  # by size, while gradients wait: beyond what is resident
    whole: int | None = None  # the same of the batch in one piece, if it was run
    ran: set[int] = field(default_factory=set)  # sizes that were run with real data
    failed: set[int] = field(default_factory=set)  # sizes that ran out of memory
    times: Times = field(default_factory=Times)
    work: float | None = None  # floating-point operations of products for one sample, where they were counted
    notes: list[str] = field(default_factory=list)  # what the user should know of how this came about

    @property
    def resident_bytes(self) -> int:
        """What is there all the time besides gradients."""
        return self.parameters + self.buffers + self.optimizer_state

    def largest(self) -> int | None:
        """The largest size that fits; None where no size does."""
        largest = self.rows if self.memory is None else self.curve().largest(self.memory, self.rows)
        # From a size that ran out of memory on nothing fits, whatever is predicted.
        return None if largest is None else min(largest, min(self.failed, default=self.rows + 1) - 1) or None

    def curve(self) -> Curve:
        """Peak over size, with what is resident.

        Where the batch's own size was run in one piece only, gradients that wait are added for the sizes right below:
        never too little, and too much by what was already added to them at the peak.
        """
        floor = self.resident_bytes + self.gradient_bytes + self.optimizer_step + self.inputs
        points = {size: peak + self.resident_bytes for size, peak in self.peaks.items()}
        if self.whole is None:
            return Curve.through(points, floor=floor)
        whole = self.whole + self.resident_bytes
        if points and max(points) < self.rows:
            points[self.rows] = max(Curve.through(points).at(self.rows), whole + self.gradient_bytes)
        return Curve.through(points, whole=(self.rows, whole), floor=floor)


def in_words(num_bytes: float) -> str:
    """Bytes with three digits and a binary unit."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB" if size < 999.5 else f"{size:,.0f} TiB"
