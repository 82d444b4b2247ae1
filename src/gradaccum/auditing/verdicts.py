"""Two gradients compared, all in all and parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL, ROUNDING, SCALED, BIASED, MISSING = "equal", "rounding", "scaled", "biased", "missing"
# Below this part of the gradient's usual size a parameter's gradient is zero up to rounding: a bias before a
# normalisation has none, and what is left of it is noise of 1e-16 that says nothing.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterVerdict:
    """How one parameter's accumulated gradient compares with the whole batch's.

    Attributes:
        name: its qualified name.
        verdict: "equal" bit by bit; "rounding"; "scaled": the right direction at `ratio` times the size; "biased":
            another direction; "missing": one side has no gradient.
        error: norm of the difference over the norm of the whole batch's gradient.
        ratio: how many times as large, along the whole batch's gradient.
    """

    name: str
    verdict: str
    error: float
    ratio: float = 1.0


def compare(
    made: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], *, tolerance: float
) -> tuple[ParameterVerdict, ...]:
    """A verdict for each parameter, in the model's order."""
    sizes = [_norm(gradient) / math.sqrt(gradient.numel()) for gradient in expected.values() if gradient is not None
             and gradient.numel()]  # fmt: skip
    usual = max(sizes, default=0.0)
    return tuple(
        _verdict(name, made.get(name), gradient, tolerance=tolerance, usual=usual)
        for name, gradient in expected.items()
    )


def _verdict(
    name: str, made: Tensor | None, expected: Tensor | None, *, tolerance: float, usual: float
) -> ParameterVerdict:
    if made is None and expected is None:
        return ParameterVerdict(name=name, verdict=EQUAL, error=0.0)
    if made is None or expected is None:
        there = made if expected is None else expected
        assert there is not None
        if _norm(there) == 0:  # None and zeros make the same update
            return ParameterVerdict(name=name, verdict=EQUAL, error=0.0)
        return ParameterVerdict(name=name, verdict=MISSING, error=1.0, ratio=0.0)
    made, expected = _flat(made), _flat(expected)
    if torch.equal(made, expected):
        return ParameterVerdict(name=name, verdict=EQUAL, error=0.0)
    size, apart = expected.norm().item(), (made - expected).norm().item()
    floor = _NOTHING * usual * math.sqrt(expected.numel())
    error = apart / max(size, floor) if max(size, floor) > 0 and math.isfinite(apart) else math.inf
    against_usual = apart / (usual * math.sqrt(expected.numel())) if usual > 0 else math.inf
    if min(error, against_usual) <= tolerance:
        return ParameterVerdict(name=name, verdict=ROUNDING, error=min(error, against_usual))
    ratio = (made @ expected).item() / size**2 if size > 0 else math.inf
    off = (made - ratio * expected).norm().item() if math.isfinite(ratio) else math.inf
    # A single number is always a multiple of another: that it is scaled says nothing.
    is_scaled = size > floor and expected.numel() > 1 and off <= 10 * tolerance * abs(ratio) * size
    return ParameterVerdict(name=name, verdict=SCALED if is_scaled else BIASED, error=error, ratio=ratio)


def relative_error(made: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """Norm of the difference over the norm of what is expected, over all parameters."""
    size = apart = 0.0
    for name, gradient in expected.items():
        other = made.get(name)
        if gradient is not None:
            size += _norm(gradient) ** 2
        if gradient is None and other is None:
            continue
        if gradient is None or other is None:
            there = other if gradient is None else gradient
            assert there is not None
            apart += _norm(there) ** 2
        else:
            apart += _norm(_flat(other) - _flat(gradient)) ** 2
    if apart == 0:
        return 0.0
    return math.sqrt(apart / size) if size > 0 and math.isfinite(apart) else math.inf


def _flat(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().double().reshape(-1)


def _norm(gradient: Tensor) -> float:
    return _flat(gradient).norm().item()
