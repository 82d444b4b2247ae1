"""Norms of gradients, and whether all of them are finite."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Up to so many elements torch's check of GradScaler, which also multiplies, is faster than a sum (2 to 7 us, against 7
# to 9 us, for four gradients).
_FEW = 8192
_ONE = torch.ones((), dtype=torch.float32, device="cpu")
_ZEROS: list[Tensor] = []  # kept, because making one takes longer than looking for what is not finite


def norms(gradients: Sequence[Tensor], order: float) -> list[Tensor]:
    """The norm of each gradient, 0-d; fp32 at least, since fp16 norms overflow."""
    found: list[Tensor] = []
    for group in grouped([gradient for gradient in gradients if gradient.numel()]):  # no maximum over nothing
        wide = torch.float32 if group[0].dtype in (torch.float16, torch.bfloat16) else None
        # The kernel under torch.nn.utils.get_total_norm, without its grouping, which takes longer than it.
        found.extend(torch._foreach_norm(group, order, dtype=wide))
    return found


def combined(found: Sequence[Tensor], order: float) -> Tensor:
    """The norm over all gradients together, 0-d, on the first one's device."""
    if not found:
        return torch.zeros(())
    if len(found) == 1:
        return found[0]
    home = found[0].device
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in found) else torch.float32
    return torch.linalg.vector_norm(torch.stack([norm.to(home, widest) for norm in found]), order)


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether nothing in them is infinite or NaN; waits for the device.

    On the host, a sum over something that is not finite is not finite either, and takes half the time of a norm. The
    norm is asked only where the sum says no: it may have overflowed.
    """
    few: list[Tensor] = []
    for gradient in gradients:
        if not gradient.is_cpu:
            break
        if gradient.numel() <= _FEW and not gradient.is_complex():
            few.append(gradient)
        elif not cmath.isfinite(gradient.sum().item()):
            break
    else:
        return not few or _are_few_finite(few)
    return math.isfinite(combined(norms(gradients, math.inf), math.inf).item())


def _are_few_finite(gradients: list[Tensor]) -> bool:
    """The same for gradients of a few elements, where one call for all of them takes less time than a sum of each.

    On the host the kernel takes them one by one, of whatever dtype.
    """
    try:
        found = _ZEROS.pop()  # one for each thread that is in here
    except IndexError:
        found = torch.zeros((), dtype=torch.float32, device="cpu")
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, _ONE)
    if found.item():
        return False
    _ZEROS.append(found)
    return True


def grouped(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """By device and dtype, as foreach kernels want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return list(groups.values())
