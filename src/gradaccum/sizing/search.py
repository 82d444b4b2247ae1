"""Which micro-batch size: found while training, from the times of real micro-batches of real batches.

Nothing is run for the search alone: it only decides how a batch that is trained on anyway is cut, and the gradient does
not depend on that. (Where it does, because BatchNorm sees the micro-batch, nothing is searched: `of_memory_only`.) The
candidates for a batch of n samples are n, n/2, n/4, ..., 2: pieces of equal size, whatever n. A single sample is run
only where two do not fit, since models that squeeze() are wrong for it.

    update 1    one piece of every candidate below n, small ones first: 2 + 2 + 4 + 8 + ... + n/2 = n
    update 2    the whole batch in one piece, unless n/2 was slower for a sample than a smaller one already
    update 3    the two fastest again, by turns: the first time a size is run it pays for warming up
    then        the fastest for good; of two that are within 3%, the smaller one

Largest is not fastest: on CPUs, pieces that stay in the cache are (a convolution network on 256 images takes 0.88 of
the whole batch's time in pieces of 32), and on GPUs the time for a sample is flat long before memory is full.

A size that runs out of memory caps those to come at half of it. After some clean updates the next larger one is tried
again, as the first piece of an update, where a failure costs that piece alone; after each failure the wait doubles, so
that in the long run trials cost nothing.

Batches of longer samples get fewer of them: what is found is kept in elements, samples times elements of a sample. What
is learned for one length afterwards (a cap, say) is remembered for that length, and caps longer ones.

Known inefficiency: time is measured once a size and update, so on a busy machine a wrong neighbour may win by some
percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_SAME = 1.03  # times that are closer than this are not told apart
_CLEARLY_SLOWER = 1.10
_ENDLESS = 1 << 62  # elements: as many as there are
_FIRST_WAIT = 8  # updates until a larger size is tried again
_LONGEST_WAIT = 1024
_SEARCHED_UPDATES = 3
_PATIENCE = 8  # updates after which a search ends with what it knows, where no two batches are alike


@dataclass(slots=True)
class _Length:
    """What is known of batches whose samples have a certain number of elements."""

    cap: int | None = None
    wait: int = _FIRST_WAIT
    clean_updates: int = 0


@dataclass(slots=True)
class SizeSearch:
    """Decides the sizes of the micro-batches of one batch after another.

    A batch is described by how many rows it has, and how many elements each of them has.

    Attributes:
        seconds: for each size that was run at the length searched at, the least time for one row.
        fastest: the size settled on, in elements; None while searching.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    fastest: int | None = None
    _on_trial: int | None = None
    _updates: int = 0
    _searched: int = 0
    _searched_rows: int = 0
    _searched_elements: int = 0
    _lengths: dict[int, _Length] = field(default_factory=dict)

    @staticmethod
    def of_memory_only() -> SizeSearch:
        """The largest size that fits, whatever is fastest."""
        return SizeSearch(fastest=_ENDLESS)

    @property
    def wants_times(self) -> bool:
        """Whether the times of pieces are wanted."""
        return self.fastest is None or self._on_trial is not None

    def sizes(self, rows: int, elements: int) -> Sequence[int]:
        """The sizes of the pieces of a batch, in the order they are to run; they add up to its rows."""
        length = self._length(elements)
        most = rows if length.cap is None else min(rows, length.cap)
        if self.fastest is None and self._is_searched(rows, elements):
            return _filled(self._wanted(rows, most), rows)
        size = min(most, self._size_for(rows, elements))
        trial = self._on_trial = self._trial(rows, elements, size)
        if trial is None:
            return _equal(rows, size)
        self.seconds.pop(trial, None)
        self.seconds.pop(size, None)
        return [trial, *(_equal(rows - trial, size) if trial < rows else [])]

    def ran(self, size: int, seconds: float, elements: int) -> None:
        """A piece of ``size`` rows ran, in so many seconds."""
        if self.wants_times and (self._on_trial is not None or elements == self._searched_elements):
            self.seconds[size] = min(self.seconds.get(size, float("inf")), seconds / size)

    def updated(self, sizes: Sequence[int], elements: int) -> None:
        """All pieces of a batch ran."""
        length = self._length(elements)
        length.clean_updates += 1
        self._updates += 1
        if self._on_trial is not None:
            self._judge(self._on_trial, sizes, length, elements)
            self._on_trial = None
        elif self.fastest is None:
            self._searched += sum(sizes) == self._searched_rows and elements == self._searched_elements
            if self._searched >= _SEARCHED_UPDATES or (self._updates >= _PATIENCE and self.seconds):
                self.fastest = self._best()[0] * self._searched_elements

    def failed(self, size: int, elements: int) -> bool:
        """A piece of ``size`` rows ran out of memory; tells whether a smaller one can be tried."""
        length = self._length(elements)
        if self._on_trial is not None and size == self._on_trial:
            length.wait = min(2 * length.wait, _LONGEST_WAIT)
        else:
            length.cap = size // 2
        length.clean_updates, self._on_trial = 0, None
        self.seconds = {tried: seconds for tried, seconds in self.seconds.items() if tried < size}
        return size > 1

    def best_size(self) -> int:
        """The size that was fastest, where the search was made."""
        return self._best()[0]

    def state_dict(self) -> dict[str, Any]:
        """What has been found, to go on with in another run on the same machine."""
        caps = {elements: length.cap for elements, length in self._lengths.items() if length.cap is not None}
        return {"fastest": self.fastest, "caps": caps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what another run has found."""
        self.fastest = state["fastest"]
        self._lengths = {int(elements): _Length(cap=cap) for elements, cap in state["caps"].items()}

    def _length(self, elements: int) -> _Length:
        """What is known of a length; of a new one, what shorter samples could not do."""
        found = self._lengths.get(elements)
        if found is None:
            caps = [
                max(1, length.cap * known // elements)
                for known, length in self._lengths.items()
                if length.cap is not None and known <= elements
            ]
            found = self._lengths[elements] = _Length(cap=min(caps, default=None))
        return found

    def _is_searched(self, rows: int, elements: int) -> bool:
        """Whether a batch is like the first one: only times of alike batches are compared."""
        if self._searched_rows == 0:
            self._searched_rows, self._searched_elements = rows, elements
        return rows == self._searched_rows and elements == self._searched_elements

    def _wanted(self, rows: int, most: int) -> list[int]:
        """Which sizes to run in a searched update, as far as the batch reaches."""
        candidates = [size for size in _candidates(rows) if size <= most] or [1]
        if self._searched == 0 or not self.seconds:
            return [size for size in candidates if size < rows] or candidates
        best, second = self._best()
        if self._searched == 1:
            largest = candidates[-1]
            if self.seconds.get(max(self.seconds), 0.0) <= _SAME * self.seconds[best]:
                return [largest]
        return [best, second] * (rows // (best + second) + 1)

    def _best(self) -> tuple[int, int]:
        """The fastest size and the one after it."""
        order = sorted(self.seconds, key=lambda size: self.seconds[size])
        best = min(size for size in order if self.seconds[size] <= _SAME * self.seconds[order[0]])
        return best, next((size for size in order if size != best), best)

    def _judge(self, trial: int, sizes: Sequence[int], length: _Length, elements: int) -> None:
        """A size above the cap fitted: it is used from now on, unless it was slower than the one before."""
        length.cap, length.clean_updates = trial, 0
        before = sizes[-1] if sizes[-1] in self.seconds else trial
        if self.seconds.get(trial, 0.0) <= _CLEARLY_SLOWER * self.seconds.get(before, float("inf")):
            self.fastest = max(self.fastest or 0, trial * elements)

    def _size_for(self, rows: int, elements: int) -> int:
        if self.fastest is not None:
            return max(1, self.fastest // max(elements, 1))
        if self.seconds:  # still searching, at another length
            return max(1, self._best()[0] * self._searched_elements // max(elements, 1))
        return max(1, rows // 8)

    def _trial(self, rows: int, elements: int, size: int) -> int | None:
        """A size above the cap to begin an update with, where it is wanted and has waited long enough."""
        length = self._length(elements)
        if self.fastest is None or length.cap is None or size < length.cap or length.clean_updates < length.wait:
            return None
        known = self.fastest // max(elements, 1)
        trial = min(2 * length.cap, rows if known <= length.cap else min(known, rows))
        return trial if trial > length.cap else None


def _candidates(rows: int) -> list[int]:
    """rows, rows / 2, rows / 4, ..., 2, rounded up; smallest first."""
    sizes = [rows]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    return sizes[::-1]


def _filled(wanted: Sequence[int], rows: int) -> list[int]:
    """The wanted sizes as long as they fit into the batch, and the rest in equal pieces not above the largest."""
    sizes: list[int] = []
    left = rows
    for size in wanted:
        if size > left:
            break
        sizes.append(size)
        left -= size
    return sorted(sizes + _equal(left, max(sizes, default=left))) if left else sizes


def _equal(rows: int, most: int) -> list[int]:
    pieces = -(-rows // most)
    size, longer = divmod(rows, pieces)
    return [size + 1] * longer + [size] * (pieces - longer)
