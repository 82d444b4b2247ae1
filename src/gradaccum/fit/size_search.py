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

A size that runs out of memory caps those to come at the next smaller one of equal pieces: two thirds or three quarters
of it. After some clean updates the next larger one is tried again, as the first piece of an update, where a failure
costs that piece alone; after each failure the wait doubles, so that in the long run trials cost nothing. One that fits
is then held against the size in use, by the times of both (`size_contest`); one that lost is tried again later.

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

from gradaccum.fit.size_contest import Contest, equal, filled, next_larger, next_smaller
from gradaccum.fit.size_model import Times
from gradaccum.window.run_counts import check_state

_SAME = 1.03  # times that are closer than this are not told apart
_WORTH_ANOTHER_LOOK = 1.20
_MAX_FINALISTS = 4
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
    _candidates: Sequence[int] = ()  # of the search that is under way
    _contest: Contest | None = None
    _lost: int | None = None  # the size that lost the last contest, in elements
    _rows: int = 1  # of the last batch
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
        return self.fastest is None or self._contest is not None

    def size(self, rows: int, elements: int) -> int:
        """The largest size of a piece of a batch; above the cap where a larger one is on trial."""
        self._rows = rows
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
            self.fastest, self._searched, self._updates, self._contest, self._lost = None, 0, 0, None, None
            self._searched_rows, self._searched_elements = rows, elements
        size, most = self.size(rows, elements), max(1, self._cap(elements) // elements)
        if self._on_trial is not None:
            return [size, *(equal(rows - size, most) if size < rows else [])]
        self._challenge(most * elements)
        if self._contest is not None:
            return self._contest.sizes(rows, elements)
        if self.fastest is None and rows == self._searched_rows and elements == self._searched_elements:
            return self._searched_sizes(rows, most)
        return equal(rows, size)

    def ran(self, size: int, seconds: float, elements: int) -> None:
        """A piece of ``size`` rows ran, in so many seconds."""
        if self._contest is not None:
            self._contest.ran(size, seconds, elements)
        elif self.fastest is None and elements == self._searched_elements:
            # Equal pieces differ by one; what an update had left over is no size that a batch is cut into.
            ran_as = next((one for one in (size, size + 1) if one in self._candidates), None)
            if ran_as is not None:
                self.times.add(ran_as, seconds * ran_as / size)

    def updated(self, sizes: Sequence[int], elements: int) -> None:
        """All pieces of a batch ran."""
        self._clean_updates += 1
        self._updates += 1
        if self._on_trial is not None:
            fits = self._on_trial * elements
            for length, cap in self.caps.items():
                if length <= _length(elements) and cap < fits:
                    self.caps[length] = fits
            if self.fastest is not None and self.fastest < fits:
                self._contest = Contest(fits, self.fastest)
            self._clean_updates, self._wait, self._on_trial = 0, max(self._wait // 2, _FIRST_WAIT), None
        elif self._contest is not None:
            self._decide(self._contest)
        elif self.fastest is None:
            self._searched += sum(sizes) == self._searched_rows and elements == self._searched_elements
            if self.times.of_size and (self._searched >= _SEARCHED_UPDATES or self._updates >= _PATIENCE):
                self.fastest = self.best_size() * self._searched_elements

    def failed(self, size: int, elements: int) -> bool:
        """A piece of ``size`` rows ran out of memory; tells whether a smaller one can be tried."""
        if self._on_trial is not None and size == self._on_trial:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        else:
            # At most all the caps there are for shorter samples.
            self.caps[_length(elements)] = min(next_smaller(size, self._rows) * elements, self._cap(elements))
        self._clean_updates, self._on_trial, self._contest = 0, None, None
        self.times = Times({tried: times for tried, times in self.times.of_size.items() if tried < size})
        return size > 1

    def best_size(self) -> int:
        """The size that was fastest, where the search was made; of those that are as fast, the smallest."""
        return min(self.times.fastest(within=_SAME))

    def state_dict(self) -> dict[str, Any]:
        """What has been found, to go on with in another run on the same machine."""
        return {
            "fastest": self.fastest,
            "caps": dict(self.caps),
            "lost": self._lost,
            "searched_rows": self._searched_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what another run has found.

        Raises:
            StateError: it is no such state.
        """
        check_state(state, "fastest", "caps", "searched_rows", of="the search for a micro-batch size")
        self.fastest = state["fastest"]
        self.caps = {int(length): int(cap) for length, cap in state["caps"].items()}
        self._lost, self._searched_rows = state.get("lost"), state["searched_rows"]

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
        candidates = self._candidates = _candidates(rows, min(rows, most))
        if self._searched == 0 or not self.times.of_size:
            return sorted(filled([size for size in reversed(candidates) if size < rows] or candidates, rows))
        fastest = self.times.fastest(within=_WORTH_ANOTHER_LOOK)[:_MAX_FINALISTS]
        if self._searched == 1 and max(self.times.of_size) in self.times.fastest(within=_SAME):
            return filled([candidates[-1]], rows)
        return filled(sorted(fastest) * rows, rows)

    def _trial(self, rows: int, elements: int, size: int) -> int | None:
        """A size above the cap to begin an update with, where it is wanted and has waited long enough."""
        most = self._cap(elements) // elements
        if self.fastest is None or size < min(most, rows) or self._clean_updates < self._wait:
            return None
        known = self.fastest // elements
        if not 1 <= most < rows:
            return min(2, rows) if most < 1 else None
        trial = next_larger(most, rows)
        return trial if known <= most else min(trial, known)

    def _challenge(self, most: int) -> None:
        """Begins another contest with the size that lost the last one, where it has waited long enough."""
        if self._lost is None or self._contest is not None or self.fastest is None or self._clean_updates < self._wait:
            return
        if self.fastest < self._lost <= most:
            self._contest = Contest(self._lost, self.fastest)

    def _decide(self, contest: Contest) -> None:
        is_won = contest.is_won()
        if is_won is None:
            return
        if is_won:
            self.fastest, self._lost, self._wait = contest.larger, None, _FIRST_WAIT
        else:
            self._lost, self._wait = contest.larger, min(2 * self._wait, _LONGEST_WAIT)
        self._contest, self._clean_updates = None, 0


def _length(elements: int) -> int:
    """The class of samples of about this many elements: two to each doubling."""
    return round(2 * math.log2(elements))


def _candidates(rows: int, most: int) -> list[int]:
    """The largest size of equal pieces up to ``most``, half of it, ..., 2, rounded up; smallest first."""
    sizes = [-(-rows // -(-rows // most))]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    return sizes[::-1]
