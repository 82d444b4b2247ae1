"""Norms of gradients, and whether all of them are finite."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Whether no element is infinite or NaN; waits for the device.

    On the host a sum decides: one over something that is not finite is not finite either, and it takes half the time of
    a norm. A finite gradient's sum may overflow, so the norm is asked where the sum says no.
    """
    if all(gradient.is_cpu and cmath.isfinite(gradient.sum().item()) for gradient in gradients):
        return True
    return math.isfinite(combined(norms(gradients, math.inf), math.inf).item())


def grouped(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """By device and dtype, as foreach kernels want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return list(groups.values())
