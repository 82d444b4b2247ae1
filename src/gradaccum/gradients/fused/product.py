"""Adds a product of matrices to a gradient in place: ``grad += alpha * left @ right``.

In one dtype that is one GEMM with beta = 1, and 0 for a window's first one. A product of bf16 that is added up in fp32
is one GEMM on CUDA as well (``out_dtype=``, torch 2.8). A host that has no arithmetic in bf16 multiplies in fp32, which
is exact, and five to ten times as fast there as torch's product in bf16 (EPYC with AVX2, 8 to 256 rows). Others make
the product and add it, without a cast between.

A window's first gradients are written where those of the window before were. On a host, memory for a large tensor comes
from the system each time, which clears it page by page: 0.35 s for the gradients of GPT-2 small, more than half of what
a micro-batch of 32 tokens takes on one core. Devices have allocators that keep their memory, so there nothing is kept.
A gradient that somebody else still holds is theirs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Add = Callable[[Tensor], None]
"""Adds the gradient of one use of a parameter to the parameter's own, given that of the use's result."""


class GradientMemory:
    """Tensors of the window before, to write gradients to."""

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, Tensor] = {}

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps the memory of these parameters' gradients for later, and nothing of what was kept before."""
        self._kept = {
            parameter: gradient
            for parameter in parameters
            if (gradient := parameter.grad) is not None and gradient.device.type == "cpu"
        }

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
    """Counts references to the tensor and to its storage, as Python's objects and as torch's."""
    tensor: Any = boxed[0]
    storage = tensor.untyped_storage()
    of_storage: int = torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), sys.getrefcount(storage), of_storage


def add_product(parameter: nn.Parameter, left: Tensor, right: Tensor, *, alpha: float, memory: GradientMemory) -> None:
    """Adds to ``parameter.grad``, or writes there where nothing is yet.

    Args:
        parameter: of 2 dimensions, or of 3 for a batch of matrices.
        left: (..., rows of the parameter, n).
        right: (..., n, columns of the parameter), of the same dtype.
        alpha: a factor.
        memory: where the first product goes.
    """
    total = parameter.grad
    dtype = accumulate_dtype_of(parameter) if total is None else total.dtype
    narrow = left.dtype
    if narrow != dtype and left.is_cpu and not _host_has(narrow):
        left, right, narrow = left.to(dtype), right.to(dtype), dtype
    # cuBLAS multiplies bf16 and fp16 into fp32: a product that is not rounded on its way to the sum.
    widens = left.is_cuda and left.dim() == 2 and dtype == torch.float32 and narrow in (torch.bfloat16, torch.float16)
    if total is None:
        if narrow == dtype:
            first = memory.take(parameter, dtype)  # of the parameter's own strides, as torch's gradients are
            torch.matmul(left, right, out=first)
        elif widens:
            first = torch.mm(left, right, out_dtype=dtype)  # type: ignore[call-overload]
        else:
            first = torch.matmul(left, right).to(dtype)
        parameter.grad = first if alpha == 1 else first.mul_(alpha)
    elif narrow == dtype:
        add = total.addmm_ if left.dim() == 2 else total.baddbmm_
        add(left, right, alpha=alpha)
    elif widens:
        torch.addmm(total, left, right, alpha=alpha, out_dtype=dtype, out=total)  # type: ignore[call-overload]
    else:
        total.add_(torch.matmul(left, right), alpha=alpha)


def accumulate_dtype_of(parameter: nn.Parameter) -> torch.dtype:
    """What the parameter's gradient is added up in."""
    wanted: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if wanted is None else wanted


@functools.cache
def _host_has(dtype: torch.dtype) -> bool:
    """Whether the host multiplies matrices of a dtype in hardware."""
    mkldnn: Any = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return True
