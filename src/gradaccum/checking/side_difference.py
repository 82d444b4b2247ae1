"""How far two sides of a look are apart, and how far rounding alone may bring them.

A parameter counts by its own gradient, unless that is a small part of all: a bias before a normalisation has none but
rounding. Everything is summed in float64, and the device is waited for once a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradaccum.checking.look_run import Side

# By what part of itself a gradient may differ without being looked into: rounding of a forward and backward, by kernels
# that depend on the shape. 5% was seen on deep networks in bfloat16.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# The last bit of each; float16's is also that of TF32.
LAST_BIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# How much more than a change of all parameters in their last bit rounding may do: it happens in every operation. In
# half precision, products are summed in float32, and the inputs' last bits are most of it.
MORE_THAN_MEASURED = {torch.float64: 30.0, torch.float32: 30.0, torch.float16: 4.0, torch.bfloat16: 4.0}
_NOTHING = 1e-3  # of a state's entries: below it their difference counts by itself
_SMALL = 1e-2  # of the whole gradient's norm: see above
_BY_PRECISION = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def norm(gradients: Mapping[str, Tensor | None]) -> float:
    """The norm of all gradients together."""
    return math.sqrt(sum(one * one for one in _norms(gradients.values())))


def difference(made: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The relative error over all parameters, or of the worst one where that is larger; infinite with NaN."""
    own = _norms(expected.values())
    off = _norms(_minus(made.get(name), gradient) for name, gradient in expected.items())
    total = math.sqrt(sum(one * one for one in own))
    if not all(map(math.isfinite, off)):
        return math.inf
    if total == 0:
        return math.inf if any(off) else 0.0
    worst = max((error / max(size, _SMALL * total) for error, size in zip(off, own, strict=True)), default=0.0)
    return max(worst, math.sqrt(sum(one * one for one in off)) / total)


def state_difference(made: Side, expected: Side, *, tolerance: float) -> dict[tuple[int, str], float]:
    """The relative error of everything that forwards changed to something else on the two sides."""
    found: dict[tuple[int, str], float] = {}
    for key in [*expected.state, *(made.state.keys() - expected.state.keys())]:
        ours, theirs = made.state.get(key), expected.state.get(key)
        if ours is None or theirs is None:  # changed on one side only: back again on the other, or called once
            found[key] = math.inf
            continue
        if torch.equal(ours, theirs) or _is_counter(theirs):
            continue
        size, off = _norms([theirs]), _norms([_minus(ours, theirs)])
        if not math.isfinite(off[0]) and torch.equal(ours.isnan(), theirs.isnan()):
            continue
        # The running mean of what is centred already is zero, and rounding.
        error = off[0] / max(size[0], _NOTHING * math.sqrt(theirs.numel()))
        if error > tolerance:
            found[key] = error
    return found


def _is_counter(tensor: Tensor) -> bool:
    """Whether it is one whole number, which counts forwards and does not enter into a gradient that was the same."""
    return not tensor.dim() and not tensor.is_floating_point() and not tensor.is_complex()


def lowest_precision(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that decides how far rounding goes."""
    known = [dtype for dtype in _BY_PRECISION if dtype in set(dtypes)]
    return known[0] if known else torch.float32


def dtypes_of(models: Sequence[nn.Module]) -> set[torch.dtype]:
    """The dtypes that forwards of these models compute in, as far as can be seen before they run."""
    parameters = [one for model in models for one in model.parameters() if one.is_floating_point()]
    found = {one.dtype for one in parameters if one.requires_grad}
    device = parameters[0].device.type if parameters else "cpu"
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    if device == "cuda" and _uses_tf32():
        found.add(torch.float16)
    return found


def _uses_tf32() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32) or bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by the newer names, which may differ from operation to operation
        return True


def _minus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    one, other = _plain(one), _plain(other)
    # Integers and booleans: a counter, a mask.
    return one - other if one.is_floating_point() else one.double() - other.double()


def _plain(tensor: Tensor) -> Tensor:
    dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def _norms(tensors: Iterable[Tensor | None]) -> list[float]:
    found: list[Tensor] = []
    for tensor in tensors:
        if tensor is None:
            found.append(torch.zeros((), dtype=torch.float64))
            continue
        plain = _plain(tensor)
        wide = plain if plain.is_floating_point() else plain.double()
        on_device = torch.linalg.vector_norm(wide, dtype=torch.float64 if wide.device.type != "mps" else torch.float32)
        found.append(on_device)
    return [float(one) for one in found]
