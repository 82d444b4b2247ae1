"""Losses that are not what they are taken for, and what to type instead: errors and warnings of one window."""

from __future__ import annotations

from collections.abc import Sequence

from gradaccum.errors import MeanError
from gradaccum.losses.counted_terms import (
    ROUNDING,
    Read,
    counts_of,
    has_divisor,
    is_coefficient,
    is_over_all,
    is_plain_sum,
    product,
)
from gradaccum.losses.graph_means import Term

_HALF = 2


def compare(name: str, seen: Sequence[Read]) -> None:
    """Holds the last micro-batch against the window's first."""
    first, now = seen[0], seen[-1]
    if first is now or len(first.terms) != len(now.terms) or first.over is None or now.over is None:
        return
    for i, (one, other) in enumerate(zip(first.terms, now.terms, strict=True)):
        if one.node != other.node or one.kind != other.kind or one.kind in ("penalty", "opaque", "far"):
            continue
        if one.kind == "unknown" and not has_divisor(one):
            continue
        pairs = list(zip(counts_of(one), counts_of(other), strict=True))
        if any(abs(b * first.over - a * now.over) <= ROUNDING * abs(a * now.over) for a, b in pairs):
            continue
        if all(a == b for a, b in pairs) and not _depends_on_samples(one, other, first, now):
            continue
        if now.how == "mean" and is_over_all(one, first.over) and is_over_all(other, now.over):
            continue
        with_term = [read for read in seen if len(read.terms) > i]
        counts = [(counts_of(read.terms[i])[0], read.over or 0.0) for read in with_term]
        if one.kind == "sum" and not has_divisor(one):
            raise MeanError(_sum_message(name, now))
        others = any(counts_of(term)[0] != counts_of(one)[0] for term in first.terms if term.kind == "mean")
        raise MeanError(mean_message(name, one, counts, how=now.how, has_others=others))


def _depends_on_samples(one: Term, other: Term, first: Read, now: Read) -> bool:
    """Whether a term that was divided by the same in both micro-batches is about their samples at all."""
    if one.rows is None or other.rows is None:
        return False
    if one.rows != other.rows:
        return one.is_sure or has_divisor(one)
    if first.samples != now.samples or first.samples is None:
        return False
    return one.kind == "mean" and one.rows % first.samples == 0


def refuse_wrong_form(name: str, read: Read) -> None:
    """A sum that is taken for a mean, and a mean that is taken for a sum."""
    main = [term for term in read.terms if term.kind != "penalty"]
    if read.how in ("plain", "mean"):
        sums = [term for term in main if is_plain_sum(term, read.samples)]
        if sums and (len(sums) == len(main) or any(term.first == read.samples for term in sums)):
            raise MeanError(_sum_message(name, read))
    elif read.how == "sum" and main and read.over is not None and read.over > 1:
        over = read.over
        means = [term.kind == "mean" and term.count and not float(term.count) % over for term in main]
        # A mean times its weight is a sum again.
        times = [any(factor.multiplies and factor.value == over for factor in term.factors) for term in main]
        if all(means) and not any(times):
            raise MeanError(
                f"{_term(name)} was returned as ga.Loss.sum(loss, over={over:g}), a sum that is still to be divided by "
                f"{over:g}, but its graph says that it is a mean already, over {float(main[0].count or 0):g} "
                f"{main[0].what}. Divided twice, its gradient would be {over:g} times too small. Return "
                f"ga.Loss.mean(loss, over={over:g})."
            )


def refuse_total_as_divisor(name: str, seen: Sequence[Read]) -> None:
    """A sum that was divided by the count of the whole window: its parts add up by themselves."""
    if seen[0].how not in ("plain", "mean") or len({len(read.terms) for read in seen}) > 1:
        return
    for terms in zip(*(read.terms for read in seen), strict=True):
        divisors = {product(None, (factor for factor in term.factors if not factor.is_shape)) for term in terms}
        if terms[0].kind != "sum" or len(divisors) > 1 or not has_divisor(terms[0]):
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


def is_left_over(seen: Sequence[Read]) -> bool:
    """Whether every loss was divided by the number of the window's micro-batches, as loops by hand do."""
    return all(_has_division_by(len(seen), read) for read in seen)


def _has_division_by(number: int, read: Read) -> bool:
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


def _is_divided_sum(term: Term, samples: int | None) -> bool:
    """Whether a term is a sum, or what may be one, that was divided by a count."""
    if term.kind == "sum":
        return term.is_sure or any(not is_coefficient(factor) and not factor.is_shape for factor in term.factors)
    divisors = [factor for factor in term.factors if not factor.multiplies]
    return term.kind == "unknown" and any(samples and not float(one.value) % samples for one in divisors)


def not_read(read: Read) -> list[Term]:
    """The terms of which it cannot be seen what they are means over, where the loss has to say so by itself."""
    if read.how != "plain" or any(term.kind == "far" for term in read.terms):
        return []
    return [term for term in read.terms if term.kind == "opaque" or _may_be_anything(term, read.samples)]


def _may_be_anything(term: Term, samples: int | None) -> bool:
    # A mean over as many features for any number of samples: over batch statistics, it may couple them.
    if term.kind == "mean":
        return not term.is_sure and bool(samples) and bool((term.rows or 0) % (samples or 1))
    return term.kind in ("sum", "unknown") and not _is_divided_sum(term, samples)


DIVISOR = "what it was divided by"
BY_COUNT = "ga.Loss.sum(losses.sum(), over=count)"


def _term(name: str) -> str:
    return f"The term {name!r}" if name else "The loss"


def name_of(term: Term) -> str:
    """The operation that a term is, as torch calls it."""
    return term.node.removeprefix("torch::autograd::").removesuffix("Backward0").removesuffix("Backward")


def mean_message(
    name: str, term: Term, seen: Sequence[tuple[float, float]], *, how: str, has_others: bool = False
) -> str:
    """The text for a mean over something else than it is taken for; ``seen`` has counts and what they should be."""
    counts = ", ".join(f"{count:g}" for count, _ in seen)
    overs = ", ".join(f"{over:g}" for _, over in seen)
    total_count, total_over = sum(count for count, _ in seen), sum(over for _, over in seen)
    taken = [(over / total_over) / (count / total_count) for count, over in seen if count and over]
    factor = max((max(share, 1 / share) for share in taken), default=float("inf"))
    times = f"{factor:.3g}" if factor >= 1.01 else f"{factor:.6g}"  # "1 times" would read as no fault
    what = term.what or DIVISOR
    if how == "plain":
        return (
            f"{_term(name)} is a plain tensor and so is taken as a mean over samples, but it was averaged over {what}: "
            f"{counts} in micro-batches of {overs} samples. Weighted by samples, one of them would count {times} "
            f"times what it should in the gradient. Return the loss with what it was averaged over: "
            f"{term.instead or BY_COUNT}. Or where the model makes the loss: ga.weight_of(loss). If each sample is to "
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


def _sum_message(name: str, read: Read) -> str:
    taken = "a plain tensor and so is taken as a mean over samples" if read.how == "plain" else "declared as a mean"
    return (
        f"{_term(name)} is {taken}, but its graph ends in a sum that was divided by nothing. Averaged over the "
        "micro-batches, its gradient would be too small by the number of them. Return ga.Loss.sum(loss), which stays a "
        "sum; or ga.Loss.sum(loss, over=n), where it is to be divided by a count n."
    )


def left_over_text(number: int) -> str:
    """The warning of a division by the number of micro-batches."""
    return (
        f"The loss was divided by {number}, and the window has {number} micro-batches. gradaccum divides by the "
        f"window's weight itself: a division left over from a loop by hand makes the gradient {number} times too "
        "small. "
        "Remove it: accumulator.backward(loss). If it is a coefficient of the loss: "
        "warnings.filterwarnings('ignore', message='The loss was divided by')."
    )


def unknown_text(terms: Sequence[Term]) -> str:
    """The warning of terms that cannot be read."""
    nodes = ", ".join(dict.fromkeys(name_of(term) for term in terms))
    known = next((term.instead for term in terms if term.instead), "")
    return (
        f"What this mean is over cannot be seen: the loss's graph ends in {nodes}. It is taken as a mean over samples; "
        "if it was one over labels, tokens or a mask, each micro-batch would get a wrong share of the gradient. Say "
        f"ga.Loss.mean(loss, over=...){f', or {known}' if known else ''}, or hold it against the whole with ga.audit."
    )
