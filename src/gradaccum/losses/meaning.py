"""What was a loss a mean over? Read off the autograd graph that made it, and held against what it is taken for.

A plain 0-d tensor is taken as a mean over samples, ``ga.Loss.mean(loss, over=n)`` as one over n. Where it was a mean
over something else the sum over micro-batches is not the whole batch's. With c_b, the product of everything that a term
of micro-batch b was divided by (`losses/graph_means`), and n_b, what it is taken as a mean over,

    c_b / n_b    must be the same for every micro-batch b of a window

and a constant in c_b, such as a number of terms or of elements a sample, changes nothing. So two micro-batches are
needed to see a fault, but for a sum, which a single graph shows.

What is accepted besides: a term that has nothing to do with samples, such as a penalty on the parameters (a mean over
as many elements for other numbers of samples); and a sum of as many terms of one form as there are samples, each
divided by its own count, which is then divided by the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradaccum.errors import MeanError
from gradaccum.losses.counted_terms import (
    ROUNDING,
    Read,
    candidates,
    counts_of,
    has_divisor,
    is_coefficient,
    is_full,
    read_loss,
)
from gradaccum.losses.graph_means import Count, Factor, Term, read_again, terms_of
from gradaccum.losses.loss import Loss, Weight, refuse_inexact
from gradaccum.losses.normaliser import SINGLE, host_number
from gradaccum.losses.wrong_means import (
    BY_COUNT,
    DIVISOR,
    compare,
    is_left_over,
    left_over_text,
    mean_message,
    not_read,
    refuse_total_as_divisor,
    refuse_wrong_form,
    unknown_text,
)

_MAX_RELEARNED = 4  # losses may change their form while training: a term that is switched on


@dataclass(frozen=True, slots=True)
class TakenOver:
    """One mean found in the graph of a loss."""

    count: Count  # what it was divided by: a number, or a 0-d tensor where it depends on the data
    what: str  # the same in words
    instead: str  # what to type instead of the plain mean


@dataclass(frozen=True, slots=True)
class _Watch:
    """A term that is looked at in later windows too, where reading it waits for nothing."""

    term: Term
    factors: list[Factor]


def means_in(loss: Tensor) -> list[TakenOver]:
    """What the terms of a loss were divided by, in the order of the graph; empty where nothing is recognised."""
    found: list[TakenOver] = []
    for term in terms_of(loss):
        divisors = [factor for factor in term.factors if not factor.is_shape and not is_coefficient(factor)]
        if term.kind == "mean" and term.count is not None:
            found.append(TakenOver(term.count, term.what, term.instead))
        elif term.kind in ("sum", "unknown") and divisors:
            of_data = [factor for factor in divisors if not factor.is_number] or divisors
            count: Any = 1
            for factor in of_data:
                count = count / factor.value if factor.multiplies else count * factor.value
            found.append(TakenOver(count, DIVISOR, BY_COUNT))
    return found


class SampleMeans:
    """Compares what losses were divided by with what they are taken for, over one window.

    In the first window of several micro-batches each graph is read to its terms; later only the nodes that had a count
    then, where they still are, and where that waits for no device. ``is_looking`` says whether `check_all` is still to
    be called.

    Attributes:
        warns_of_unknown: whether a loss of which nothing can be read is worth a warning; not where it is measured.
    """

    def __init__(self, *, warns_of_unknown: bool = False) -> None:
        self.warns_of_unknown = warns_of_unknown
        self.is_looking = True
        self._seen: dict[str, list[Read]] = {}
        self._is_first_window = True
        self._watched: dict[str, list[_Watch]] = {}
        self._firsts: dict[str, tuple[float, list[float]]] = {}
        self._is_stale = False
        self._relearned = 0

    def check_all(self, loss: Any, samples: int | None, weights: Mapping[str, Any]) -> None:
        """Checks every term of a loss, as the user returned it.

        Raises:
            MeanError: it is not what it is taken for.
        """
        for name, one in loss.items() if isinstance(loss, Mapping) else ((SINGLE, loss),):
            if isinstance(one, Loss):
                how = ("mean" if one.is_mean else "sum") if one.weight is not None else "plain sum"
                self._check(name, one.root, how, one.weight, samples)
            elif isinstance(one, Tensor):
                weight = weights.get(name)
                self._check(name, one, "plain" if weight is None else "mean", weight, samples)

    def check(self, name: str, loss: Tensor, samples: int) -> None:
        """Checks one micro-batch's plain mean."""
        self._check(name, loss, "plain", None, samples)

    def _check(self, name: str, root: Tensor, how: str, weight: Weight | None, samples: int | None) -> None:
        weighs_nothing = weight is not None and host_number(weight) == 0 if root.is_cpu else False
        if samples == 0 or root.grad_fn is None or weighs_nothing:
            return
        if not self._is_first_window:
            self._check_again(name, root, how, weight, samples)
            return
        over: Any = samples if weight is None else weight
        count = None if over is None else float(over)  # waits for a device, in the first window alone
        if count is not None:
            refuse_inexact(over, count, name=f"The loss {name!r}" if name else "The loss")
        now = Read(how, count, samples, read_loss(root, samples))
        seen = self._seen.setdefault(name, [])
        seen.append(now)
        refuse_wrong_form(name, now)
        if how in ("plain", "mean"):
            compare(name, seen)

    def _check_again(self, name: str, root: Tensor, how: str, weight: Weight | None, samples: int | None) -> None:
        watched = self._watched.get(name)
        if not watched:
            return
        over = samples if how == "plain" else None if weight is None else host_number(weight)
        if over is None or isinstance(over, Tensor):
            return
        counts: list[float] = []
        for watch in watched:
            count = read_again(root, watch.term, watch.factors)
            if count is None:  # another loss than before: the next window is read anew
                self._is_stale = True
                return
            counts.append(count)
        first_over, first_counts = self._firsts.setdefault(name, (over, counts))
        for count, first, watch in zip(counts, first_counts, watched, strict=True):
            if abs(count * first_over - first * over) > ROUNDING * abs(first * over):
                term = watch.term
                pairs = [(first, first_over), (count, float(over))]
                if how == "mean" and over and not (count % over or first % first_over) and is_full(root, term):
                    continue
                raise MeanError(mean_message(name, term, pairs, how=how))

    def window_complete(self, warn: Callable[[str], None]) -> None:
        """Looks at a window as a whole, before its update; ``warn(text)`` gives a warning.

        Raises:
            MeanError: sums were divided by what the whole window has.
        """
        for name, seen in self._seen.items():
            if len(seen) > 1:
                refuse_total_as_divisor(name, seen)
        several = {name: seen for name, seen in self._seen.items() if len(seen) > 1}
        left_over = next((len(seen) for seen in several.values() if is_left_over(seen)), 0)
        if left_over:
            warn(left_over_text(left_over))
        unknown = [term for seen in several.values() for term in not_read(seen[0])]
        if unknown and self.warns_of_unknown:
            self.warns_of_unknown = False
            warn(unknown_text(unknown))

    def evidence(self) -> str:
        """What has been read of the open window, in the words of the plan line; empty where nothing was."""
        plain = [seen[0] for seen in self._seen.values() if seen[0].how == "plain"]
        if any(not_read(read) for seen in self._seen.values() for read in seen[:1]):
            return "not checked: what the mean is over cannot be seen"
        if plain:
            return "read: a mean over samples"
        return "weights as declared" if self._seen else ""

    def window_closed(self) -> None:
        """Forgets the window's counts, and decides what of later windows is looked at."""
        if any(len(seen) > 1 for seen in self._seen.values()):
            self._is_first_window = False
            self._watched = {name: watches for name, seen in self._seen.items() if (watches := _watches(seen))}
        elif self._is_stale and self._relearned < _MAX_RELEARNED:
            self._is_first_window = True
            self._relearned += 1
        self.is_looking = self._is_first_window or bool(self._watched)
        self.window_discarded()

    def window_discarded(self) -> None:
        """Forgets what has been seen of the open window."""
        self._seen.clear()
        self._firsts.clear()
        self._is_stale = False


def _watches(seen: Sequence[Read]) -> list[_Watch]:
    """The terms of a window's losses that a later window's are looked at for."""
    first = seen[0]
    if first.how not in ("plain", "mean") or any(len(read.terms) != len(first.terms) for read in seen):
        return []
    found: list[_Watch] = []
    for i, term in enumerate(first.terms):
        if term.kind not in ("mean", "sum") or not term.is_on_host or (term.kind == "sum" and not has_divisor(term)):
            continue
        for which, factors in enumerate(candidates(term)):
            pairs = [(counts_of(read.terms[i])[which], read.over) for read in seen]
            a, first_over = pairs[0]
            if first_over and all(over and abs(b * first_over - a * over) <= ROUNDING * a * over for b, over in pairs):
                found.append(_Watch(term, factors))
                break
    return found
