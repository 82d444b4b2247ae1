r"""Do pieces add up to the whole? The arithmetic of one cut, for the gradient and for the value.

    grad whole  =  \sum_b  c_b * grad part_b          c_b: 1 for a sum, n_b / (n_1 + n_2 + ...) for a mean over n

A cut is the whole and the pieces that it was cut into. A share of 0 takes its piece out, as in training: the NaN of a
mean over nothing does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradaccum.checking.compare import flat
from gradaccum.checking.root_runs import PLAIN_SUM, Gradient, Run, Term

# Of the whole gradient's norm: a parameter below this part of it is compared with this part, not with its own gradient,
# which may be nothing but rounding (the bias of attention's keys).
_SMALL = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A loss, or a part of one: its value, None where it is not known, and its gradient."""

    value: float | None
    gradient: Gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Some rows together, and in pieces."""

    whole: Run
    parts: Sequence[Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far what the pieces make is from the whole."""

    gradient: float  # relative, the largest over all parameters
    value: float  # relative

    def within(self, tolerance: float) -> bool:
        """Whether both agree."""
        return self.gradient <= tolerance and self.value <= tolerance


def as_value(term: Term) -> Measured:
    """A term as the loss that it stands for: a sum that is over something divided by it."""
    divisor = term.divisor
    if divisor == 1.0:
        return Measured(value=term.value, gradient=term.gradient)
    return scaled(Measured(value=term.value, gradient=term.gradient), 1 / divisor if divisor else math.nan)


def declared_shares(terms: Sequence[Term]) -> list[float]:
    """The shares that training gives the *values* of a term's pieces, by what was declared for each."""
    weights = [1.0 if term.weight is None else term.weight for term in terms]
    total = sum(weights)
    if terms[0].kind == PLAIN_SUM:
        return [1.0] * len(terms)
    return [weight / total if total else 0.0 for weight in weights]


def declared_difference(cut: Cut, name: str) -> Difference:
    """How far a term's pieces, added up as training adds them up, are from the whole."""
    terms = [part.terms[name] for part in cut.parts]
    return difference(as_value(cut.whole.terms[name]), [as_value(term) for term in terms], declared_shares(terms))


def scaled(measured: Measured, factor: float) -> Measured:
    """Returns a multiple."""
    value = None if measured.value is None else measured.value * factor
    gradient = [None if one is None else one * factor for one in measured.gradient]
    return Measured(value=value, gradient=gradient)


def added_up(parts: Sequence[Measured], shares: Sequence[float]) -> Measured:
    """Returns the sum of the pieces, each times its share; a share of 0 takes its piece out."""
    kept = [scaled(part, share) for part, share in zip(parts, shares, strict=True) if share != 0]
    values = [part.value for part in kept]
    total = None if None in values else sum(value for value in values if value is not None)
    gradient: list[Tensor | None] = []
    for of_parameter in zip(*(part.gradient for part in kept), strict=True):
        present = [one for one in of_parameter if one is not None]
        gradient.append(sum(present[1:], start=present[0]) if present else None)
    return Measured(value=total, gradient=gradient or [None] * len(parts[0].gradient))


def difference(whole: Measured, parts: Sequence[Measured], shares: Sequence[float]) -> Difference:
    """Compares the whole with its pieces, in gradient and value."""
    kept = [(part, share) for part, share in zip(parts, shares, strict=True) if share != 0]
    made = added_up(parts, shares)
    # Pieces may cancel: what they are made of gives the size that rounding is relative to.
    sizes = [_norm(whole.gradient), *(abs(share) * _norm(part.gradient) for part, share in kept)]
    size = max(sizes)
    worst = 0.0
    for expected, got in zip(whole.gradient, made.gradient, strict=True):
        off = _norm([_minus(expected, got)])
        if off > 0 or math.isnan(off):
            own = max(_norm([expected]), _norm([got]), _SMALL * size)
            worst = max(worst, off / own if math.isfinite(off) and own > 0 else math.inf)
    value = 0.0
    if whole.value is not None and made.value is not None:
        scale = max(abs(whole.value), *(abs(share * (part.value or 0.0)) for part, share in kept), 1e-300)
        off = abs(whole.value - made.value) / scale
        value = off if math.isfinite(off) else math.inf
    return Difference(gradient=worst, value=value)


def solved_shares(whole: Measured, parts: Sequence[Measured]) -> tuple[list[float], float]:
    """The shares that explain the whole's gradient best, by least squares, and the part of it that they leave."""
    columns = torch.stack([_vector(part.gradient, whole.gradient) for part in parts], dim=1)
    expected = _vector(whole.gradient, whole.gradient)
    if not columns.isfinite().all() or not expected.norm() > 0 or len(expected) < 2 * len(parts):
        return [], math.inf
    scale = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    shares = torch.linalg.lstsq(columns / scale, expected, driver="gelsd").solution / scale
    return shares.tolist(), float((expected - columns @ shares).norm() / expected.norm())


def _vector(gradient: Gradient, like: Gradient) -> Tensor:
    flats = [
        flat(one) if one is not None else torch.zeros(0 if other is None else flat(other).numel(), dtype=torch.float64)
        for one, other in zip(gradient, like, strict=True)
        if other is not None
    ]
    return torch.cat([one.cpu() for one in flats])


def _minus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return flat(one) - flat(other)


def _norm(gradient: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(flat(one).square().sum()) for one in gradient if one is not None))
