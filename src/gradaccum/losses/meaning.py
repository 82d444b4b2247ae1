"""What was a loss a mean over? Read off the autograd graph that made it, and held against what it is taken for.

A plain 0-d tensor is taken as a mean over samples, ``ga.Loss.mean(loss, over=n)`` as one over n. Where it was a mean
over something else the sum over micro-batches is not the whole batch's. With c_b, the product of everything that a term of
micro-batch b was divided by (`losses/graph_means`), and n_b, what it is taken as a mean over,

    c_b / n_b    must be the same for every micro-batch b of a window

and a constant in c_b, such as a number of terms or of elements a sample, changes nothing. So two micro-batches are
needed to see a fault, but for a sum, which a single graph shows.

What is accepted besides: a term that has nothing to do with samples, such as a penalty on the parameters (a mean over
as many elements for other numbers of samples); and a sum of as many terms of one form as there are samples, each
divided by its own count, which is then divided by the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gradaccum.errors import LossError, MeanError
from gradaccum.losses.graph_means import Count, Factor, Term, read_again, terms_of
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.normaliser import SINGLE, host_number

_ROUNDING = 1e-5  # sums of fp32 class weights; a real mismatch is a whole sample's weight
_MAX_RELEARNED = 4  # losses may change their form while training: a term that is switched on
_HALF = 2


@dataclass(frozen=True, slots=True)
class TakenOver:
    """One mean found in the graph of a loss."""

    count: Count  # what it was divided by: a number, or a 0-d tensor where it depends on the data
    what: str  # the same in words
    instead: str  # what to type instead of the plain mean


@dataclass(frozen=True, slots=True)
class _Read:
    """One micro-batch's loss: what it is taken for, and its terms, with counts as Python numbers."""

    how: str  # "plain", "mean", "sum", or "plain sum", which is divided by nothing
    over: float | None  # what it is a mean over, as declared, or its samples; None where that is on a device
    samples: int | None
    terms: list[Term]


@dataclass(frozen=True, slots=True)
class _Watch:
    """A term that is looked at in later windows too, where reading it waits for nothing."""

    term: Term
    factors: list[Factor]


def means_in(loss: Tensor) -> list[TakenOver]:
    """What the terms of a loss were divided by, in the order of the graph; empty where nothing is recognised."""
    found: list[TakenOver] = []
    for term in terms_of(loss):
        divisors = [factor for factor in term.factors if not factor.is_shape and not _is_coefficient(factor)]
        if term.kind == "mean" and term.count is not None:
            found.append(TakenOver(term.count, term.what, term.instead))
        elif term.kind in ("sum", "unknown") and divisors:
            of_data = [factor for factor in divisors if not factor.is_number] or divisors
            count: Any = 1
            for factor in of_data:
                count = count / factor.value if factor.multiplies else count * factor.value
            found.append(TakenOver(count, _DIVISOR, _BY_COUNT))
    return found


def weight_of(loss: Tensor) -> Loss:
    """What a plain loss was a mean over, read off its graph, as a `Loss` of the same value.

    The count is that of elements, of labels that are not ignored, or the sum of class weights: whatever the mean was
    divided by. Factors (``0.5 * loss``) stay factors.

    Args:
        loss: 0-d tensor with a graph.

    Returns:
        ``ga.Loss.mean(loss, over=count)``; the count is on the loss's device where it depends on the data.

    Raises:
        LossError: the loss is a sum, was made by something whose inside has no graph (compiled, a custom autograd
            function), or is a sum of means over different things.

    Example:
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> ga.weight_of(F.cross_entropy(logits, torch.tensor([0, 2, -100, 1]))).weight
        tensor(3.)
    """
    if not isinstance(loss, Tensor) or loss.dim() or loss.grad_fn is None:
        shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(
            f"ga.weight_of needs a 0-d tensor with a graph, and got one {shown} that has none to be read. Its share of "
            "the gradient would be a guess. Pass the loss itself, before .item() and .detach()."
        )
    terms = [term for term in terms_of(loss) if term.kind != "penalty"]
    means = means_in(loss)
    if any(term.kind == "sum" for term in terms) and len(means) < len(terms):
        raise LossError(
            "ga.weight_of was given a sum, which was divided by nothing, so that it has no weight. As a mean each "
            "micro-batch's gradient would be too small by the number of them. Say what it is: ga.Loss.sum(loss), or "
            "ga.Loss.sum(loss, over=n) for a sum that is to be divided by n."
        )
    if not means or len(means) < len(terms):
        nodes = ", ".join(dict.fromkeys(_name_of(term) for term in terms if term.kind != "mean"))
        raise LossError(
            f"What this mean is over cannot be seen: its graph ends in {nodes}, which does not say what it divided by. "
            "Its share of the gradient would be a guess. Say it: ga.Loss.mean(loss, over=n)."
        )
    counts = [host_number(mean.count) for mean in means]
    first = counts[0]
    if any(bool(abs(count - first) > _ROUNDING * abs(first)) for count in counts[1:]):
        shown = " and ".join(f"{float(count):g} ({mean.what})" for count, mean in zip(counts, means, strict=True))
        raise LossError(
            f"The loss is a sum of means over different things, {shown}, so that it has no single weight: weighed by "
            'one of them the others would be wrong. Return them by name, {"first": ..., "second": ...}, and pass '
            "weights=, which counts both."
        )
    return Loss.mean(loss, over=means[0].count)


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
        self._seen: dict[str, list[_Read]] = {}
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
        if samples == 0 or root.grad_fn is None:
            return
        if not self._is_first_window:
            self._check_again(name, root, how, weight, samples)
            return
        over: Any = samples if weight is None else weight
        now = _Read(how, None if over is None else float(over), samples, _read(root, samples))
        seen = self._seen.setdefault(name, [])
        seen.append(now)
        _refuse_wrong_form(name, now)
        if how in ("plain", "mean"):
            _compare(name, seen)

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
            if abs(count * first_over - first * over) > _ROUNDING * abs(first * over):
                term = watch.term
                pairs = [(first, first_over), (count, float(over))]
                if how == "mean" and over and not (count % over or first % first_over) and _is_full(root, term):
                    continue
                raise MeanError(_message(name, term, pairs, how=how))

    def window_complete(self, warn: Any) -> None:
        """Looks at a window as a whole, before its update; ``warn(text)`` gives a warning.

        Raises:
            MeanError: sums were divided by what the whole window has.
        """
        for name, seen in self._seen.items():
            if len(seen) > 1:
                _refuse_total_as_divisor(name, seen)
        several = {name: seen for name, seen in self._seen.items() if len(seen) > 1}
        left_over = next((len(seen) for seen in several.values() if _is_left_over(seen)), 0)
        if left_over:
            warn(_left_over(left_over))
        unknown = [term for seen in several.values() for term in _not_read(seen[0])]
        if unknown and self.warns_of_unknown:
            self.warns_of_unknown = False
            warn(_unknown(unknown))

    def evidence(self) -> str:
        """What has been read of the open window, in the words of the plan line; empty where it was declared."""
        plain = [seen[0] for seen in self._seen.values() if seen[0].how == "plain"]
        if any(_not_read(read) for seen in self._seen.values() for read in seen[:1]):
            return "not checked: what the mean is over cannot be seen"
        return "read: a mean over samples" if plain else ""

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


# ------------------------------------------------------------------------------------------------------------- reading
def _read(root: Tensor, samples: int | None) -> list[Term]:
    terms = [
        replace(
            term,
            count=None if term.count is None else float(term.count),
            factors=tuple(replace(factor, value=float(factor.value)) for factor in term.factors),
            is_on_host=all(
                not isinstance(value, Tensor) or value.device.type == "cpu"
                for value in (term.count, *(factor.value for factor in term.factors))
            ),
        )
        for term in terms_of(root)
    ]
    return _as_one_sum(terms, samples) or terms


def _is_full(root: Tensor, term: Term) -> bool:
    """Whether the same term of another loss is a mean over all of its elements, none of which is left out."""
    now = next((one for one in _read(root, None) if one.path == term.path), term)
    return now.kind == "mean" and now.count == now.rows


def _as_one_sum(terms: Sequence[Term], samples: int | None) -> list[Term]:
    """One term for the sum of a loss a sample, each with a count of its own; empty where it is no such sum.

    Two heads' losses of a micro-batch of two samples are no such sum: there counts are the samples', or alike.
    """
    main = [term for term in terms if term.kind != "penalty"]
    if samples is None or samples < _HALF or len(main) % samples or len({term.node for term in main}) > 1:
        return []
    if len(main) != samples:
        return []
    own = [_product(term.count if term.kind == "mean" else None, _own_factors(term, main)) for term in main]
    sizes = [term.rows for term in main]
    are_of_samples = len(set(own)) == 1 and all(size is not None and size % samples == 0 for size in sizes)
    if are_of_samples:
        return []
    common = tuple(factor for factor in main[0].factors if factor not in _own_factors(main[0], main))
    one = Term("sum", main[0].path, main[0].node, common, rows=samples, first=samples, is_on_host=False)
    return [one, *(term for term in terms if term.kind == "penalty")]


def _own_factors(term: Term, terms: Sequence[Term]) -> list[Factor]:
    return [factor for factor in term.factors if any(factor not in other.factors for other in terms)]


def _product(count: Any, factors: Iterable[Factor]) -> float:
    product = 1.0 if count is None else float(count)
    for factor in factors:
        value = float(factor.value)
        if factor.multiplies:
            product = product / value if value else product
        else:
            product *= value
    return product


def _is_coefficient(factor: Factor) -> bool:
    return factor.multiplies and factor.is_number


# ------------------------------------------------------------------------------------------------------------- judging
def _candidates(term: Term) -> list[list[Factor]]:
    """What may have been meant as the count of a term, besides its mean's own: with its coefficients, and without."""
    factors = list(term.factors)
    if term.kind == "mean":
        return [[factor for factor in factors if not factor.multiplies and not factor.is_number], factors]
    return [[factor for factor in factors if not factor.multiplies] or factors, factors]


def _counts(term: Term) -> list[float]:
    count = term.count if term.kind == "mean" else None
    return [_product(count, factors) for factors in _candidates(term)]


def _has_divisor(term: Term) -> bool:
    return any(not _is_coefficient(factor) for factor in term.factors)


def _compare(name: str, seen: Sequence[_Read]) -> None:
    """Holds the last micro-batch against the window's first."""
    first, now = seen[0], seen[-1]
    if first is now or len(first.terms) != len(now.terms) or first.over is None or now.over is None:
        return
    for i, (one, other) in enumerate(zip(first.terms, now.terms, strict=True)):
        if one.node != other.node or one.kind != other.kind or one.kind in ("penalty", "opaque", "far"):
            continue
        if one.kind == "unknown" and not _has_divisor(one):
            continue
        pairs = list(zip(_counts(one), _counts(other), strict=True))
        if any(abs(b * first.over - a * now.over) <= _ROUNDING * abs(a * now.over) for a, b in pairs):
            continue
        if all(a == b for a, b in pairs) and not _depends_on_samples(one, other, first, now):
            continue
        if now.how == "mean" and _is_over_all(one, first.over) and _is_over_all(other, now.over):
            continue
        with_term = [read for read in seen if len(read.terms) > i]
        counts = [(_counts(read.terms[i])[0], read.over or 0.0) for read in with_term]
        if one.kind == "sum" and not _has_divisor(one):
            raise MeanError(_sum_message(name, now))
        others = any(_counts(term)[0] != _counts(one)[0] for term in first.terms if term.kind == "mean")
        raise MeanError(_message(name, one, counts, how=now.how, has_others=others))


def _depends_on_samples(one: Term, other: Term, first: _Read, now: _Read) -> bool:
    """Whether a term that was divided by the same in both micro-batches is about their samples at all."""
    if one.rows is None or other.rows is None:
        return False
    if one.rows != other.rows:
        return one.is_sure or _has_divisor(one)
    if first.samples != now.samples or first.samples is None:
        return False
    return one.kind == "mean" and one.rows % first.samples == 0


def _is_over_all(term: Term, over: float) -> bool:
    """Whether a mean was over as many elements for each of ``over`` things: then it is one over these, too."""
    return term.kind == "mean" and term.count == term.rows and bool(term.rows) and over > 0 and not term.rows % over


def _is_plain_sum(term: Term, samples: int | None) -> bool:
    """Whether a term is the sum over a micro-batch's samples, divided by nothing."""
    if term.kind != "sum" or not term.is_sure or _has_divisor(term) or not samples or samples < _HALF:
        return False
    for factor in term.factors:  # 1 / n by hand is a divisor
        inverse = 1 / float(factor.value) if factor.value else math.nan
        if not factor.is_number or not math.isfinite(inverse):
            return False
        if inverse >= 1 and abs(inverse / samples - round(inverse / samples)) < _ROUNDING:
            return False
    return term.first is not None and term.first % samples == 0


def _refuse_wrong_form(name: str, read: _Read) -> None:
    """A sum that is taken for a mean, and a mean that is taken for a sum."""
    main = [term for term in read.terms if term.kind != "penalty"]
    if read.how in ("plain", "mean"):
        sums = [term for term in main if _is_plain_sum(term, read.samples)]
        if sums and (len(sums) == len(main) or any(term.first == read.samples for term in sums)):
            raise MeanError(_sum_message(name, read))
    elif read.how == "sum" and main and read.over is not None and read.over > 1:
        over = read.over
        if all(term.kind == "mean" and term.count and not float(term.count) % over for term in main):
            raise MeanError(
                f"{_term(name)} was returned as ga.Loss.sum(loss, over={over:g}), a sum that is still to be divided by "
                f"{over:g}, but its graph says that it is a mean already, over {float(main[0].count or 0):g} "
                f"{main[0].what}. Divided twice, its gradient would be {over:g} times too small. Return "
                f"ga.Loss.mean(loss, over={over:g})."
            )


def _refuse_total_as_divisor(name: str, seen: Sequence[_Read]) -> None:
    """A sum that was divided by the count of the whole window: its parts add up by themselves."""
    if seen[0].how not in ("plain", "mean") or len({len(read.terms) for read in seen}) > 1:
        return
    for terms in zip(*(read.terms for read in seen), strict=True):
        divisors = {_product(None, (factor for factor in term.factors if not factor.is_shape)) for term in terms}
        if terms[0].kind != "sum" or len(divisors) > 1 or not _has_divisor(terms[0]):
            continue
        divisor = divisors.pop()
        totals = {sum(term.rows or 0 for term in terms), sum(float(term.count or 0) for term in terms)} - {0}
        totals |= {float(sum(read.samples or 0 for read in seen))}
        own = {term.rows for term in terms} | {term.count for term in terms}
        is_one = any(not factor.multiplies and factor.value == divisor for factor in terms[0].factors)
        if is_one and divisor in totals and divisor not in own:
            raise MeanError(
                f"{_term(name)} is a sum divided by {divisor:g}, which is the count of the whole window of {len(seen)} "
                f"micro-batches, and is taken as a mean over each micro-batch's own. Averaged once more, its gradient "
                f"would be {len(seen)} times too small. Its parts add up by themselves: return ga.Loss.sum(loss)."
            )


def _is_left_over(seen: Sequence[_Read]) -> bool:
    """Whether every loss was divided by the number of the window's micro-batches, as loops by hand do."""
    return all(_has_division_by(len(seen), read) for read in seen)


def _has_division_by(number: int, read: _Read) -> bool:
    main = [term for term in read.terms if term.kind != "penalty"]
    if not main or len(main) == number:  # then it is a mean of that many terms
        return False
    for factor in main[0].factors:
        # One half is a common coefficient: only as a division it says anything.
        is_it = float(factor.value) * number == 1 if factor.multiplies and number > _HALF else factor.value == number
        if not is_it or not factor.is_number or (factor.multiplies and number <= _HALF):
            continue
        if any(factor not in term.factors for term in main):
            continue
        # A sum that was divided by nothing else has been divided by its samples, of which there are as many.
        others = [other for other in main[0].factors if other is not factor and not other.multiplies]
        if main[0].kind == "mean" or others or read.how == "sum":
            return True
    return False


def _not_read(read: _Read) -> list[Term]:
    """The terms of which it cannot be seen what they are means over, where the loss has to say so by itself."""
    if read.how != "plain":
        return []
    main = [term for term in read.terms if term.kind != "penalty"]
    opaque = [term for term in main if term.kind == "opaque"]
    if opaque:
        return opaque
    is_known = any(
        term.kind == "mean" or (term.kind == "sum" and (term.is_sure or _has_divisor(term))) for term in main
    )
    return [] if is_known or any(term.kind == "far" for term in main) else main


def _watches(seen: Sequence[_Read]) -> list[_Watch]:
    """The terms of a window's losses that a later window's are looked at for."""
    first = seen[0]
    if first.how not in ("plain", "mean") or any(len(read.terms) != len(first.terms) for read in seen):
        return []
    found: list[_Watch] = []
    for i, term in enumerate(first.terms):
        if term.kind not in ("mean", "sum") or not term.is_on_host or (term.kind == "sum" and not _has_divisor(term)):
            continue
        for which, factors in enumerate(_candidates(term)):
            pairs = [(_counts(read.terms[i])[which], read.over) for read in seen]
            a, first_over = pairs[0]
            if first_over and all(over and abs(b * first_over - a * over) <= _ROUNDING * a * over for b, over in pairs):
                found.append(_Watch(term, factors))
                break
    return found


# --------------------------------------------------------------------------------------------------------------- words
_DIVISOR = "what it was divided by"
_BY_COUNT = "ga.Loss.sum(losses.sum(), over=count)"


def _term(name: str) -> str:
    return f"The term {name!r}" if name else "The loss"


def _name_of(term: Term) -> str:
    return term.node.removeprefix("torch::autograd::").removesuffix("Backward0").removesuffix("Backward")


def _message(name: str, term: Term, seen: Sequence[tuple[float, float]], *, how: str, has_others: bool = False) -> str:
    counts = ", ".join(f"{count:g}" for count, _ in seen)
    overs = ", ".join(f"{over:g}" for _, over in seen)
    total_count, total_over = sum(count for count, _ in seen), sum(over for _, over in seen)
    taken = [(over / total_over) / (count / total_count) for count, over in seen if count and over]
    factor = max((max(share, 1 / share) for share in taken), default=float("inf"))
    times = f"{factor:.3g}" if factor >= 1.01 else f"{factor:.6g}"  # "1 times" would read as no fault
    what = term.what or _DIVISOR
    if how == "plain":
        return (
            f"{_term(name)} is a plain tensor and so is taken as a mean over samples, but it was averaged over {what}: "
            f"{counts} in micro-batches of {overs} samples. Weighted by samples, one of them would count {times} "
            f"times what it should in the gradient. Return the loss with what it was averaged over: "
            f"{term.instead or _BY_COUNT}. Or where the model makes the loss: ga.weight_of(loss). If each sample is to "
            "count alike, average over each sample first."
        )
    several = (
        ' It is a sum of means over different things: return them by name, {"first": ..., "second": ...}, and let '
        "weights= count both."
        if has_others
        else ""
    )
    return (
        f"{_term(name)} was declared as a mean over {overs}, but its graph says that it was averaged over {what}: "
        f"{counts}. Weighted as declared, one of the micro-batches would count {times} times what it should in the "
        "gradient. Count what the loss counts (a model that shifts its labels counts labels[:, 1:]), or return "
        f"ga.weight_of(loss), which reads it.{several}"
    )


def _sum_message(name: str, read: _Read) -> str:
    taken = "a plain tensor and so is taken as a mean over samples" if read.how == "plain" else "declared as a mean"
    return (
        f"{_term(name)} is {taken}, but its graph ends in a sum that was divided by nothing. Averaged over the "
        "micro-batches, its gradient would be too small by the number of them. Return ga.Loss.sum(loss), which stays a "
        "sum; or ga.Loss.sum(loss, over=n), where it is to be divided by a count n."
    )


def _left_over(number: int) -> str:
    return (
        f"The loss was divided by {number}, and the window has {number} micro-batches. gradaccum divides by the "
        f"window's weight itself: a division left over from a loop by hand makes the gradient {number} times too "
        "small. "
        "Remove it: accumulator.backward(loss). If it is a coefficient of the loss: "
        "warnings.filterwarnings('ignore', message='The loss was divided by')."
    )


def _unknown(terms: Sequence[Term]) -> str:
    nodes = ", ".join(dict.fromkeys(_name_of(term) for term in terms))
    known = next((term.instead for term in terms if term.instead), "")
    return (
        f"What this mean is over cannot be seen: the loss's graph ends in {nodes}. It is taken as a mean over samples; "
        "if it was one over labels, tokens or a mask, each micro-batch would get a wrong share of the gradient. Say "
        f"ga.Loss.mean(loss, over=...){f', or {known}' if known else ''}, or hold it against the whole with ga.audit."
    )
