"""A larger micro-batch size against the one in use, by the times of both, and the ladder of sizes between them.

A size that has just been found to fit is not judged by its first piece: that pays for memory asked for and kernels
chosen, and on a busy machine for whatever else ran. Both sizes run by turns over some updates, in one update where the
batch has rows for both, so that what else the machine does meets both alike. What it costs is that about half of a
handful of updates runs in the slower size.

The ladder has two steps to each doubling: batches in 1, 2, 3, 4, 6, 8, 12, ... equal pieces. Halving alone would leave
up to half of the memory unused (24 rows where 11 fit: 6 instead of 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradaccum.fit.size_model import median

_CLEARLY_SLOWER = 1.10
_MIN_TIMES = 3  # of each size, without the first one
_PATIENCE = 16  # updates after which it ends undecided, where batches are too short for the larger size


@dataclass(slots=True)
class Contest:
    """Two sizes, in elements: samples times elements of a sample."""

    larger: int
    smaller: int
    _updates: int = 0
    _rows: tuple[int, int] = (0, 0)  # of both, in the present update
    _seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # for an element

    def sizes(self, rows: int, elements: int) -> Sequence[int]:
        """The sizes of the pieces of a batch, in the order they are to run."""
        larger, smaller = (max(1, min(size // elements, rows)) for size in (self.larger, self.smaller))
        self._rows = larger, smaller
        self._updates += 1
        if larger + smaller <= rows:
            return filled([larger, smaller] * rows, rows)
        return equal(rows, larger if self._updates % 2 else smaller)

    def ran(self, size: int, seconds: float, elements: int) -> None:
        """A piece of ``size`` rows ran, in so many seconds."""
        if size in self._rows and self._rows[0] != self._rows[1]:
            self._seconds[self._rows.index(size)].append(seconds / (size * elements))

    def is_won(self) -> bool | None:
        """Whether the larger size is to be used; None while that is not known."""
        larger, smaller = (times[1:] for times in self._seconds)
        if min(len(larger), len(smaller)) >= _MIN_TIMES:
            return median(larger) <= _CLEARLY_SLOWER * median(smaller)
        return False if self._updates >= _PATIENCE else None


def next_smaller(size: int, rows: int) -> int:
    """The next size of the ladder below one that did not fit; at least 1."""
    pieces = max(1, rows // size)
    while size > 1 and -(-rows // pieces) >= size:
        pieces = _next_rung(pieces)
    return max(1, min(-(-rows // pieces), size - 1))


def next_larger(size: int, rows: int) -> int:
    """The next size of the ladder above one that fits, and that is smaller than the batch."""
    pieces, below = 1, -(-rows // size)
    while (more := _next_rung(pieces)) < below:
        pieces = more
    return -(-rows // pieces)


def _next_rung(pieces: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, ... above a number of pieces."""
    power = 1 << (pieces.bit_length() - 1)
    return power + power // 2 if power + power // 2 > pieces else 2 * power


def filled(wanted: Sequence[int], rows: int) -> list[int]:
    """The wanted sizes as far as they fit into the batch, and the rest in equal pieces not above the largest."""
    sizes: list[int] = []
    left = rows
    for size in wanted:
        if size <= left:
            sizes.append(size)
            left -= size
    if left == 1 and sizes and min(sizes) < max(sizes):  # no piece of one
        sizes[sizes.index(min(sizes))] += 1
    elif left:
        sizes += equal(left, max(sizes, default=left))
    return sizes


def equal(rows: int, most: int) -> list[int]:
    """As many rows in pieces as equal as can be, of at most so many."""
    pieces = -(-rows // most)
    size, longer = divmod(rows, pieces)
    return [size + 1] * longer + [size] * (pieces - longer)
