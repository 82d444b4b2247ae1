"""Peak memory over the micro-batch size, from a few sizes at which it is known.

At each moment of a micro-batch the bytes alive are affine in its size n: what is there anyway, plus so much a sample.
The peak is the largest over all moments, a maximum of affine functions: convex, and straight from some size on. For
large models that is from the first sample on, and two sizes give the rest; small ones may take their peak in another
layer when the size grows. Between two sizes that are known the straight line is exact or too high, never too low;
beyond the last one the slope goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes at their peak over the micro-batch size.

    Attributes:
        points: at least one size with its bytes, while a batch is accumulated: gradients of other micro-batches wait.
        whole: the batch's size, and the bytes at which it runs in one piece; None where unknown.
        floor: bytes that an update takes at any size.
    """

    points: tuple[tuple[int, int], ...]
    whole: tuple[int, int] | None = None
    floor: int = 0

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

    def largest(self, memory: int, batch_size: int) -> int | None:
        """The largest size up to the batch's that takes at most so much memory; None where no size does."""
        if self.at(batch_size) <= memory:
            return batch_size
        low, high = 0, batch_size  # low fits, or is 0; high does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.at(middle) <= memory:
                low = middle
            else:
                high = middle
        return low or None

    def _accumulating(self, size: int) -> float:
        last = self.points[-1]
        if size > last[0]:
            return last[1] + (size - last[0]) * self.bytes_per_sample
        for left, right in pairwise(self.points):
            if size <= right[0]:
                return left[1] + (size - left[0]) * _slope(left, right)
        return last[1]


def _slope(left: tuple[int, int], right: tuple[int, int]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
