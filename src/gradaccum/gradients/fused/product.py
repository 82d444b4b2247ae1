"""Adds a product of matrices to a gradient in place: ``grad += alpha * left @ right``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.gradients.fused.gradient_memory import GradientMemory

Gradients = tuple[Tensor | None, ...]
"""What flows into a node that has one result; None where nothing does."""

Add = Callable[[Gradients], None]
"""A hook of a node: adds the gradient of one use of a weight to that weight's own."""


def adder_of(parameter: nn.Parameter, dtype: torch.dtype, memory: GradientMemory) -> Callable[..., object]:
    """What adds products to ``parameter.grad``, called with their factors and ``alpha=``: decided before the backward.

    Args:
        parameter: as for `add_product`.
        dtype: of the factors.
        memory: as for `add_product`.
    """
    total = parameter.grad
    if total is not None and total.dtype == dtype:  # one call of torch's: nothing else is run between two GEMMs
        return total.addmm_ if parameter.dim() == 2 else total.baddbmm_
    return functools.partial(add_product, parameter, memory=memory)


def add_product(parameter: nn.Parameter, left: Tensor, right: Tensor, *, alpha: float, memory: GradientMemory) -> None:
    """Adds to ``parameter.grad``, or writes there where nothing is yet.

    In one dtype that is one GEMM with beta = 1, and 0 for the first one. A product of bf16 that is added up in fp32 is
    one GEMM on CUDA as well (``out_dtype=``, torch 2.8). A host that has no arithmetic in bf16 multiplies in fp32,
    which is exact, and five to ten times as fast there as torch's product in bf16 (EPYC with AVX2, 8 to 256 rows).
    Others make the product and add it, without a cast between.

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
    if total is None:
        parameter.grad = _first(parameter, left, right, alpha, memory)
    elif narrow == dtype:
        if left.dim() == 2:
            total.addmm_(left, right, alpha=alpha)
        else:
            total.baddbmm_(left, right, alpha=alpha)
    elif left.is_cuda and left.dim() == 2 and _widens(narrow, dtype):
        torch.addmm(total, left, right, alpha=alpha, out_dtype=dtype, out=total)  # type: ignore[call-overload]
    else:
        total.add_(torch.matmul(left, right), alpha=alpha)


def accumulate_dtype_of(parameter: nn.Parameter) -> torch.dtype:
    """What the parameter's gradient is added up in."""
    wanted: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if wanted is None else wanted


def _first(parameter: nn.Parameter, left: Tensor, right: Tensor, alpha: float, memory: GradientMemory) -> Tensor:
    dtype = accumulate_dtype_of(parameter)
    if left.dtype == dtype:
        total = memory.take(parameter, dtype)  # of the parameter's own strides, as torch's gradients are
        torch.matmul(left, right, out=total)
    elif left.is_cuda and left.dim() == 2 and _widens(left.dtype, dtype):
        total = torch.mm(left, right, out_dtype=dtype)  # type: ignore[call-overload]
    else:
        total = torch.matmul(left, right).to(dtype)
    return total if alpha == 1 else total.mul_(alpha)


@functools.cache
def _host_has(dtype: torch.dtype) -> bool:
    """Whether the host multiplies matrices of a dtype in hardware."""
    mkldnn: Any = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return True


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return wide == torch.float32 and narrow in (torch.bfloat16, torch.float16)
