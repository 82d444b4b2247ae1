r"""Do pieces add up to the whole? The arithmetic of one cut, for the gradient and for the value.

    grad whole  =  \sum_b  c_b * grad part_b          c_b: 1 for a sum, n_b / (n_1 + n_2 + ...) for a mean over n

A cut is the whole and the pieces that it was cut into. A share of 0 takes its piece out, as in training: the NaN of a
mean over nothing does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gradaccum.checking.gradient_sketch import Gradient, norms_of
from gradaccum.checking.root_runs import PLAIN_SUM, Run, Term

# Of the whole gradient's norm: a parameter below this part of it is compared with this part, not with its own gradient,
# which may be nothing but rounding (the bias of attention's keys).
_SMALL = 1e-2
_TINY = torch.finfo(torch.float64).tiny


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
    if term.divisor == 1.0:
        return Measured(value=term.value, gradient=term.gradient)
    factor = 1 / term.divisor if term.divisor else math.nan
    gradient = replace(term.gradient, vector=term.gradient.vector * factor)
    return Measured(value=term.value * factor, gradient=gradient)


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


def difference(whole: Measured, parts: Sequence[Measured], shares: Sequence[float]) -> Difference:
    """Compares the whole with its pieces, each times its share, in gradient and value."""
    kept = [(part, share) for part, share in zip(parts, shares, strict=True) if share != 0]
    vector = whole.gradient.vector
    made = sum((share * part.gradient.vector for part, share in kept), start=torch.zeros_like(vector))
    off, made_norms = norms_of(vector - made, whole.gradient.sizes), norms_of(made, whole.gradient.sizes)
    # Pieces may cancel: what they are made of gives the size that rounding is relative to.
    size = max(float(vector.norm()), *(abs(share) * float(part.gradient.vector.norm()) for part, share in kept), _TINY)
    own = torch.maximum(whole.gradient.norms(), made_norms).clamp_min(_SMALL * size)
    worst = float((off / own).max()) if len(off) else 0.0
    if whole.value is None:
        return Difference(gradient=_or_infinite(worst), value=0.0)
    values = [share * (part.value or 0.0) for part, share in kept]
    scale = max(abs(whole.value), *(abs(value) for value in values), _TINY)
    return Difference(gradient=_or_infinite(worst), value=_or_infinite(abs(whole.value - sum(values)) / scale))


def made_value(parts: Sequence[Measured], shares: Sequence[float]) -> float:
    """Returns what the values of pieces add up to; a share of 0 takes its piece out."""
    return sum(share * (part.value or 0.0) for part, share in zip(parts, shares, strict=True) if share != 0)


def _or_infinite(number: float) -> float:
    return number if math.isfinite(number) else math.inf


def solved_shares(whole: Measured, parts: Sequence[Measured]) -> tuple[list[float], float]:
    """Returns the shares that explain the whole's gradient best, by least squares, and the part that they leave.

    NaN is left where they cannot be solved for.
    """
    columns = torch.stack([part.gradient.vector for part in parts], dim=1)
    expected = whole.gradient.vector
    if not columns.isfinite().all() or not expected.norm() > 0 or len(expected) < 2 * len(parts):
        return [], math.nan
    scale = columns.norm(dim=0).clamp_min(_TINY)
    shares = torch.linalg.lstsq(columns / scale, expected, driver="gelsd").solution / scale
    return shares.tolist(), float((expected - columns @ shares).norm() / expected.norm())
