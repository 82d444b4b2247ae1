"""Which micro-batch size: found while training, from the times of real micro-batches of real batches.

Nothing is run for the search alone: it only decides how a batch that is trained on anyway is cut, and the gradient does
not depend on that. (Where it does, because BatchNorm sees the micro-batch, nothing is searched: `of_memory_only`.) The
candidates for a batch of n samples are n, n/2, n/4, ..., 2: micro-batches of equal size, whatever n. A single sample is
run only where two do not fit, since models that squeeze() are wrong for it.

    update 1    one micro-batch of every candidate below n, small ones first: 2 + 2 + 4 + 8 + ... + n/2 = n
    update 2    the whole batch in one piece, unless n/2 was slower for a sample than a smaller one already
    update 3    up to four of the fastest again, by turns
    then        the fastest for good; of two that are within 3%, the smaller one

How a size is judged by its times: `size_model`.

Largest is not fastest: on CPUs, pieces that stay in the cache are (a convolution network on 256 images takes 0.88 of
the whole batch's time in pieces of 32), and on GPUs the time for a sample is flat long before memory is full.

A size that runs out of memory caps those to come at half of it. After some clean updates twice the cap is tried again,
as the first piece of an update, where a failure costs that piece alone; after each failure the wait doubles, so that in
the long run trials cost nothing.

Batches of longer samples get fewer of them: sizes are kept in elements, samples times elements of a sample. A cap holds
for samples as long as those that met it, and for longer ones; what fits for long samples fits for shorter ones too.

Known inefficiency: time is measured once a size and update, so on a busy machine a wrong neighbour may win by some
percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradaccum.fit.size_model import Times

_SAME = 1.03  # times that are closer than this are not told apart
_WORTH_ANOTHER_LOOK = 1.20
_MAX_FINALISTS = 4
_CLEARLY_SLOWER = 1.10
_CLEARLY_MORE = 1.25  # rows than the batch that was searched with: worth another search
_ENDLESS = 1 << 62  # elements: as many as there are
_FIRST_WAIT = 8  # updates until a larger size is tried again
_LONGEST_WAIT = 1024
_SEARCHED_UPDATES = 3
_PATIENCE = 8  # updates after which a search ends with what it knows, where no two batches are alike


@dataclass(slots=True)
class SizeSearch:
    """Decides the sizes of the micro-batches of one batch after another, from its rows and the elements of each."""

    times: Times = field(default_factory=Times)  # of the sizes that were run at the length searched at
    fastest: int | None = None  # the size settled on, in elements; None while searching
    caps: dict[int, int] = field(default_factory=dict)  # by the samples' `_length`: the largest size, in elements
    _is_by_time: bool = True
    _on_trial: int | None = None
    _wait: int = _FIRST_WAIT
    _clean_updates: int = 0
    _updates: int = 0
    _searched: int = 0
    _searched_rows: int = 0
    _searched_elements: int = 1

    @staticmethod
    def of_memory_only() -> SizeSearch:
        """The largest size that fits, whatever is fastest."""
        return SizeSearch(fastest=_ENDLESS, _is_by_time=False)

    @property
    def wants_times(self) -> bool:
        """Whether the times of pieces are wanted."""
        return self.fastest is None or self._on_trial is not None

    def size(self, rows: int, elements: int) -> int:
        """The largest size of a piece of a batch; above the cap where a larger one is on trial."""
        size = max(1, min(rows, self._cap(elements) // elements, self._wanted_size(rows, elements)))
        self._on_trial = self._trial(rows, elements, size)
        return self._on_trial or size

    def sizes(self, rows: int, elements: int) -> Sequence[int]:
        """The sizes of the pieces of a batch, in the order they are to run; they add up to its rows."""
        is_first = self._searched_rows == 0
        is_larger = rows > _CLEARLY_MORE * self._searched_rows and elements <= 2 * self._searched_elements
        if self._is_by_time and (is_first or is_larger):
            # Only times of batches alike are compared, and a larger one has sizes that were never tried.
            self.times = Times()
            self.fastest, self._searched, self._updates = None, 0, 0
            self._searched_rows, self._searched_elements = rows, elements
        size, most = self.size(rows, elements), max(1, self._cap(elements) // elements)
        if self._on_trial is not None:
            self.times.of_size.pop(size, None)
            self.times.of_size.pop(most, None)
            return [size, *(_equal(rows - size, most) if size < rows else [])]
        if self.fastest is None and rows == self._searched_rows and elements == self._searched_elements:
            return self._searched_sizes(rows, most)
        return _equal(rows, size)

    def ran(self, size: int, seconds: float, elements: int) -> None:
        """A piece of ``size`` rows ran, in so many seconds."""
        if self._on_trial is not None or (self.fastest is None and elements == self._searched_elements):
            self.times.add(size, seconds)

    def updated(self, sizes: Sequence[int], elements: int) -> None:
        """All pieces of a batch ran."""
        self._clean_updates += 1
        self._updates += 1
        if self._on_trial is not None:
            fits = self._on_trial * elements
            for length, cap in self.caps.items():
                if length <= _length(elements) and cap < fits:
                    self.caps[length] = fits
            seconds = self.times.seconds()
            # It is used for good, unless it was slower than the one before.
            if seconds.get(self._on_trial, 0.0) <= _CLEARLY_SLOWER * seconds.get(sizes[-1], math.inf):
                self.fastest = max(self.fastest or 0, fits)
            self._clean_updates, self._wait, self._on_trial = 0, max(self._wait // 2, _FIRST_WAIT), None
        elif self.fastest is None:
            self._searched += sum(sizes) == self._searched_rows and elements == self._searched_elements
            if self.times.of_size and (self._searched >= _SEARCHED_UPDATES or self._updates >= _PATIENCE):
                self.fastest = self.best_size() * self._searched_elements

    def failed(self, size: int, elements: int) -> bool:
        """A piece of ``size`` rows ran out of memory; tells whether a smaller one can be tried."""
        if self._on_trial is not None and size == self._on_trial:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        else:
            # Rounded up like the candidates; and at most all the caps there are for shorter samples.
            self.caps[_length(elements)] = min(-(-size // 2) * elements, self._cap(elements))
        self._clean_updates, self._on_trial = 0, None
        self.times = Times({tried: times for tried, times in self.times.of_size.items() if tried < size})
        return size > 1

    def best_size(self) -> int:
        """The size that was fastest, where the search was made; of those that are as fast, the smallest."""
        return min(self.times.fastest(within=_SAME))

    def state_dict(self) -> dict[str, Any]:
        """What has been found, to go on with in another run on the same machine."""
        return {"fastest": self.fastest, "caps": dict(self.caps), "searched_rows": self._searched_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what another run has found."""
        self.fastest = state["fastest"]
        self.caps = {int(length): int(cap) for length, cap in state["caps"].items()}
        self._searched_rows = state["searched_rows"]

    def _cap(self, elements: int) -> int:
        length = _length(elements)
        return min((cap for met_by, cap in self.caps.items() if met_by <= length), default=_ENDLESS)

    def _wanted_size(self, rows: int, elements: int) -> int:
        if self.fastest is not None:
            return self.fastest // elements
        if self.times.of_size:  # still searching, at another length
            return self.best_size() * self._searched_elements // elements
        return max(2, rows // 8)

    def _searched_sizes(self, rows: int, most: int) -> Sequence[int]:
        """The pieces of an update that is searched with."""
        candidates = [size for size in _candidates(rows) if size <= most] or [1]
        if self._searched == 0 or not self.times.of_size:
            return sorted(_filled([size for size in reversed(candidates) if size < rows] or candidates, rows))
        fastest = self.times.fastest(within=_WORTH_ANOTHER_LOOK)[:_MAX_FINALISTS]
        if self._searched == 1 and max(self.times.of_size) in self.times.fastest(within=_SAME):
            return _filled([candidates[-1]], rows)
        return _filled(sorted(fastest) * rows, rows)

    def _trial(self, rows: int, elements: int, size: int) -> int | None:
        """A size above the cap to begin an update with, where it is wanted and has waited long enough."""
        most = self._cap(elements) // elements
        if self.fastest is None or size < min(most, rows) or self._clean_updates < self._wait:
            return None
        known = self.fastest // elements
        trial = min(2 * max(most, 1), rows if known <= most else min(known, rows))
        return trial if trial > most else None


def _length(elements: int) -> int:
    """The class of samples of about this many elements: two to each doubling."""
    return round(2 * math.log2(elements))


def _candidates(rows: int) -> list[int]:
    """rows, rows / 2, rows / 4, ..., 2, rounded up; smallest first."""
    sizes = [rows]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    return sizes[::-1]


def _filled(wanted: Sequence[int], rows: int) -> list[int]:
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
        sizes += _equal(left, max(sizes, default=left))
    return sizes


def _equal(rows: int, most: int) -> list[int]:
    pieces = -(-rows // most)
    size, longer = divmod(rows, pieces)
    return [size + 1] * longer + [size] * (pieces - longer)
