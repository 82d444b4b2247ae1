"""One term's sum over the micro-batches of a window, for the loss that is reported.

Roots on the host are read as they come: their backward has to have their value anyway, and a number keeps no graph. On
a device they stay, detached, until somebody asks, since reading one waits for all work before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradaccum.types import HALF_DTYPES

Number = float | Tensor
"""A Python number, or a 0-d tensor on a device that is not to be waited for."""


class TermSum:
    """The roots of one term, each times its share.

    Args:
        weight: of the first micro-batch.

    Attributes:
        weight: the total so far; None for a plain sum, which is divided by nothing.
    """

    __slots__ = ("_dtype", "_on_device", "_on_host", "weight")

    def __init__(self, weight: Number | None) -> None:
        self.weight = weight
        self._on_host = 0.0
        self._on_device: list[tuple[Tensor, Number]] = []
        self._dtype: torch.dtype | None = None

    def add(self, root: Tensor, share: Number) -> None:
        """Adds a root, 0-d, ``share`` times; not at all where that is 0, since a mean over nothing is NaN."""
        if self._dtype is None:
            self._dtype = torch.float32 if root.dtype in HALF_DTYPES else root.dtype
        if is_read_at_once(root) and not isinstance(share, Tensor):
            if share:
                self._on_host += root.item() * share
        else:
            self._on_device.append((root.detach(), share))

    def mean(self, weight: Number | None) -> Tensor:
        """The sum over ``weight``, 0-d and detached; the sum itself where that is None."""
        dtype = torch.float32 if self._dtype is None else self._dtype
        if not self._on_device and not isinstance(weight, Tensor):
            total = self._on_host
            quotient = total if weight is None else total / weight if weight else math.nan
            return torch.tensor(quotient, dtype=dtype)
        device = self._on_device[0][0].device if self._on_device else torch.device("cpu")
        # fp64 where the device has it: at 1,000 micro-batches an fp32 sum would show in the seventh digit.
        total = self._on_host
        wide = torch.full((), total, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        for root, share in self._on_device:
            if isinstance(share, Tensor):
                wide = wide + torch.where(share == 0, torch.zeros_like(root), root * share).to(wide)
            elif share:
                wide = wide + (root.to(wide) * share)
        return (wide if weight is None else wide / weight).to(dtype)


def is_read_at_once(root: Tensor) -> bool:
    """Whether a root's value is there to be read, without a wait and without asking other processes."""
    return root.is_cpu and type(root) is Tensor
