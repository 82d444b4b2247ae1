"""The terms of one micro-batch's loss with their counts as Python numbers, and what was divided by in all.

A term's count is the product of what it was divided by on its way: a mean's own count and the divisors round it, where
a factor 1 / n counts as a division by n. Whether a coefficient belongs to the count cannot be known, so there are two
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gradaccum.losses.graph_means import Factor, Term, terms_of

ROUNDING = 1e-5  # sums of fp32 class weights; a real mismatch is a whole sample's weight
_HALF = 2


@dataclass(frozen=True, slots=True)
class Read:
    """One micro-batch's loss: what it is taken for, and its terms, with counts as Python numbers."""

    how: str  # "plain", "mean", "sum", or "plain sum", which is divided by nothing
    over: float | None  # what it is a mean over, as declared, or its samples; None where that is on a device
    samples: int | None
    terms: list[Term]


def read_loss(root: Tensor, samples: int | None) -> list[Term]:
    """The terms of a loss; waits for counts that lie on a device."""
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


def is_full(root: Tensor, term: Term) -> bool:
    """Whether the same term of another loss is a mean over all of its elements, none of which is left out."""
    now = next((one for one in read_loss(root, None) if one.path == term.path), term)
    return now.kind == "mean" and _is_complete(now)


def _as_one_sum(terms: Sequence[Term], samples: int | None) -> list[Term]:
    """One term for the sum of a loss a sample, each with a count of its own; empty where it is no such sum.

    Two heads' losses of a micro-batch of two samples are no such sum: there counts are the samples', or alike.
    """
    main = [term for term in terms if term.kind != "penalty"]
    if samples is None or samples < _HALF or len(main) % samples or len({term.node for term in main}) > 1:
        return []
    if len(main) != samples:
        return []
    if all(term.first == samples < (term.rows or 0) for term in main):
        return []  # each of them is over all samples: label smoothing's two sums, of a micro-batch of two samples
    own = [product(term.count if term.kind == "mean" else None, _own_factors(term, main)) for term in main]
    sizes = [term.rows for term in main]
    are_of_samples = len(set(own)) == 1 and all(size is not None and size % samples == 0 for size in sizes)
    if are_of_samples:
        return []
    common = tuple(factor for factor in main[0].factors if factor not in _own_factors(main[0], main))
    one = Term("sum", main[0].path, main[0].node, common, rows=samples, first=samples, is_on_host=False)
    return [one, *(term for term in terms if term.kind == "penalty")]


def _own_factors(term: Term, terms: Sequence[Term]) -> list[Factor]:
    return [factor for factor in term.factors if any(factor not in other.factors for other in terms)]


def product(count: Any, factors: Iterable[Factor]) -> float:
    """What a term was divided by in all: its own count, if any, and these factors."""
    product = 1.0 if count is None else float(count)
    for factor in factors:
        value = float(factor.value)
        if factor.multiplies:
            product = product / value if value else product
        else:
            product *= value
    return product


def is_coefficient(factor: Factor) -> bool:
    """Whether a factor is a number in front of a term, as in ``0.1 * loss``."""
    return factor.multiplies and factor.is_number


def candidates(term: Term) -> list[list[Factor]]:
    """What may have been meant as the count of a term, besides its mean's own: with its coefficients, and without."""
    factors = list(term.factors)
    if term.kind == "mean":
        return [[factor for factor in factors if not factor.multiplies and not factor.is_number], factors]
    return [[factor for factor in factors if not factor.multiplies] or factors, factors]


def counts_of(term: Term) -> list[float]:
    """What a term may have been a mean over; see `candidates`."""
    count = term.count if term.kind == "mean" else None
    return [product(count, factors) for factors in candidates(term)]


def has_divisor(term: Term) -> bool:
    """Whether a sum has been divided by anything."""
    return any(not is_coefficient(factor) for factor in term.factors)


def is_over_all(term: Term, over: float) -> bool:
    """Whether a mean was over as many elements for each of ``over`` things: then it is one over these, too."""
    return term.kind == "mean" and over > 0 and _is_complete(term) and bool(term.rows) and not (term.rows or 0) % over


def is_plain_sum(term: Term, samples: int | None) -> bool:
    """Whether a term is the sum over a micro-batch's samples, divided by nothing."""
    if term.kind != "sum" or not term.is_sure or has_divisor(term) or not samples or samples < _HALF:
        return False
    for factor in term.factors:  # 1 / n by hand is a divisor
        inverse = 1 / float(factor.value) if factor.value else math.nan
        if not factor.is_number or not math.isfinite(inverse):
            return False
        if inverse >= 1 and abs(inverse / samples - round(inverse / samples)) < ROUNDING:
            return False
    return term.first is not None and term.first % samples == 0


def _is_complete(term: Term) -> bool:
    return term.rows is not None and term.count is not None and float(term.count) == term.rows
