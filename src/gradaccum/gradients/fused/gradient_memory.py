"""Gradients of one window are written where those of the window before were.

On a host, memory for a large tensor comes from the system each time, which clears it page by page: 0.35 s for the
gradients of GPT-2 small, more than half of what a micro-batch of 32 tokens takes on one core. Devices have allocators
that keep their memory, so there nothing is kept here.

A gradient that somebody else still holds is theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class GradientMemory:
    """Tensors to write gradients to."""

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, Tensor] = {}

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps the present gradients' memory for later, and of what was kept before nothing."""
        self._kept = {
            parameter: gradient
            for parameter in parameters
            if (gradient := parameter.grad) is not None and gradient.device.type == "cpu"
        }

    def free(self) -> None:
        """Keeps nothing."""
        self._kept = {}

    def take(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape and strides, with anything in it."""
        if parameter in self._kept:
            kept = [self._kept.pop(parameter)]
            if _is_nobody_elses(kept) and kept[0].dtype == dtype and kept[0].shape == parameter.shape:
                return kept[0]
        return torch.empty_like(parameter, requires_grad=False, dtype=dtype)


def _is_nobody_elses(boxed: list[Tensor]) -> bool:
    """Whether only this list refers to a tensor: no name, view, other library or numpy array, as for a new one."""
    return _references(boxed) == _references([torch.empty(1)])


def _references(boxed: list[Tensor]) -> tuple[int, ...]:
    """To the tensor and its storage, as Python's objects and as torch's."""
    tensor: Any = boxed[0]
    storage = tensor.untyped_storage()
    of_storage: int = torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), sys.getrefcount(storage), of_storage
