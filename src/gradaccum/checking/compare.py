"""Two gradients compared, over all parameters and parameter by parameter, and the buffers that two runs leave.

Nothing here knows where a gradient comes from: `made` is the accumulated one, `expected` that of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]  # by the parameter's qualified name; None where there is none
Buffers = Mapping[tuple[str, str], Tensor]  # by the module's qualified name and the buffer's own

EQUAL, ROUNDING, SCALED, BIASED, MISSING = "equal", "rounding", "scaled", "biased", "missing"
# Below this part of the gradient's usual size a parameter's gradient is zero up to rounding: a bias before a
# normalisation has none, and what is left of it is noise of 1e-16 that says nothing.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterVerdict:
    """How one parameter's accumulated gradient compares with the whole batch's.

    The verdict is "equal" bit by bit; "rounding"; "scaled": the right direction at ``ratio`` times the size; "biased":
    another direction; "missing": one side has no gradient.
    """

    name: str
    verdict: str
    error: float  # norm of the difference over the norm of the whole batch's gradient
    ratio: float = 1.0  # how many times as large, along the whole batch's gradient


def compare(made: Gradients, expected: Gradients, *, tolerance: float) -> tuple[ParameterVerdict, ...]:
    """Returns a verdict for each parameter, in the model's order."""
    present = [gradient for gradient in expected.values() if gradient is not None and gradient.numel()]
    usual = max((_norm(gradient) / math.sqrt(gradient.numel()) for gradient in present), default=0.0)
    return tuple(
        _verdict(name, made.get(name), gradient, tolerance=tolerance, usual=usual)
        for name, gradient in expected.items()
    )


def _verdict(
    name: str, made: Tensor | None, expected: Tensor | None, *, tolerance: float, usual: float
) -> ParameterVerdict:
    if made is None or expected is None:
        if _norm(made) == _norm(expected) == 0:  # None and zeros make the same update
            return ParameterVerdict(name=name, verdict=EQUAL, error=0.0)
        return ParameterVerdict(name=name, verdict=MISSING, error=1.0, ratio=0.0)
    made, expected = flat(made), flat(expected)
    if torch.equal(made, expected):
        return ParameterVerdict(name=name, verdict=EQUAL, error=0.0)
    size, difference = _norm(expected), _norm(made - expected)
    usual_size = usual * math.sqrt(expected.numel())
    floor = max(size, _NOTHING * usual_size)
    error = difference / floor if floor > 0 and math.isfinite(difference) else math.inf
    least = min(error, difference / usual_size if usual > 0 else math.inf)
    if least <= tolerance:
        return ParameterVerdict(name=name, verdict=ROUNDING, error=least)
    ratio = (made @ expected).item() / size**2 if size > 0 else math.inf
    off = _norm(made - ratio * expected) if math.isfinite(ratio) else math.inf
    # A single number is always a multiple of another: that it is scaled says nothing.
    is_scaled = size > _NOTHING * usual_size and expected.numel() > 1 and off <= 10 * tolerance * abs(ratio) * size
    return ParameterVerdict(name=name, verdict=SCALED if is_scaled else BIASED, error=error, ratio=ratio)


def relative_error(made: Gradients, expected: Gradients) -> float:
    """Returns the norm of the difference over the norm of what is expected, over all tensors. None counts as zeros."""
    size = difference = 0.0
    for name, tensor in expected.items():
        other = made.get(name)
        size += _norm(tensor) ** 2
        if tensor is None or other is None:
            difference += _norm(tensor) ** 2 + _norm(other) ** 2
        else:
            difference += _norm(flat(other) - flat(tensor)) ** 2
    if difference == 0:
        return 0.0
    return math.sqrt(difference / size) if size > 0 and math.isfinite(difference) else math.inf


def different_buffers(made: Buffers, expected: Buffers, tolerance: float) -> dict[tuple[str, str], float]:
    """Returns the relative error of every buffer that is off by more than the tolerance, infinite in another shape."""
    found: dict[tuple[str, str], float] = {}
    for key, buffer in expected.items():
        is_same_shape = key in made and made[key].shape == buffer.shape
        error = relative_error({"": made[key]}, {"": buffer}) if is_same_shape else math.inf
        if error > tolerance:
            found[key] = error
    return found


def flat(tensor: Tensor) -> Tensor:
    """Returns a tensor as a vector in float64; sparse ones become dense, complex numbers two real ones."""
    dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).double().reshape(-1)


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else flat(tensor).norm().item()
