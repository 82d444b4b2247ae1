"""Mean and variance of pieces, merged into those of the whole, and normalising by them.

With x the whole batch's values of one channel, cut into pieces j of n_j values:

    Moments     mean_j, var_j                            of piece j; the variance biased, around its own mean
    merge       mean = sum_j w_j mean_j                  w_j = n_j / N
                var  = sum_j w_j (var_j + (mean_j - mean)^2)
    Normalize   y    = (x - mean) / sqrt(var + eps) * weight + bias

which is BatchNorm of the whole (Ioffe and Szegedy 2015) with the merging of Chan, Golub and LeVeque 1979, "Updating
formulae and a pairwise algorithm for computing sample variances". The rejected alternative, E[x^2] - E[x]^2, cancels:
at a mean of 1,000 standard deviations nothing is left of a variance in fp32.

Both ends are autograd functions whose saved tensors are those that BatchNorm would save; in between are a few
operations on ``[C]``. So the pieces are joined in one graph, and one ordinary backward has all the sums over the batch:

    Normalize   dx    = dy * weight / s                      s = sqrt(var + eps), xhat = (x - mean) / s
                dmean = -weight / s * sum dy                 dvar  = -weight / (2 s^2) * sum dy xhat
    Moments     dx    = dmean_j / n_j + 2 dvar_j (x - mean_j) / n_j

Statistics of half-precision inputs are fp32, as torch's are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from gradaccum.types import HALF_DTYPES
from gradaccum.whole_batch.batch_norm.layers import Call

_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The statistics of some rows: how many values each channel has, and their mean and biased variance, ``[C]``."""

    count: int
    mean: Tensor
    var: Tensor


class Moments(Function):
    """``(mean, biased variance)`` of each channel of ``[n, C, ...]``; ``check`` raises where no backward may be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, check: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        mean, var = moments(x)
        ctx.save_for_backward(x, mean)
        ctx.check = check
        return mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """``dx``, as in the formulas above."""
        ctx.check()
        dmean, dvar = cast(tuple[Tensor, Tensor], gradients)
        x, mean = ctx.saved_tensors
        count = max(x.numel() // max(x.shape[1], 1), 1)
        around_mean = x.to(mean.dtype) - _per_channel(mean, x)
        dx = around_mean.mul_(_per_channel(dvar * (2 / count), x)).add_(_per_channel(dmean / count, x))
        return dx.to(x.dtype), None


class Normalize(Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with gradients for the statistics too; ``check`` as above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        check: Callable[[], None],
    ) -> Tensor:
        """The normalised rows."""
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps, ctx.check = eps, check
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Torch's kernel for evaluation: one pass, any memory format, half inputs with fp32 statistics.
        return torch.native_batch_norm(x, _wide(weight), _wide(bias), mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """``dx``, ``dmean``, ``dvar`` as in the formulas above, and those of weight and bias."""
        ctx.check()
        (dy,) = cast(tuple[Tensor], gradients)
        x, mean, var, weight = ctx.saved_tensors
        dx, dweight, dbias = _aten.native_batch_norm_backward(
            dy, x, _wide(weight), mean, var, None, None, False, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        dmean = dvar = None
        if ctx.needs_input_grad[1]:
            inverse = torch.rsqrt(var + ctx.eps)
            scale = inverse if weight is None else inverse * weight
            dmean = -scale * dbias
            dvar = -0.5 * scale * inverse * dweight
        return (
            dx if ctx.needs_input_grad[0] else None,
            dmean,
            dvar,
            dweight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[3] else None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None,
            None,
            None,
        )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(mean, biased variance)`` of every channel, without a graph."""
    wide = x.detach().float() if x.dtype in HALF_DTYPES else x.detach()
    if not wide.numel():
        nothing = wide.new_zeros(wide.shape[1])
        return nothing, nothing.clone()
    if wide.is_cpu:  # what torch's own batch norm calls there: three to six times faster than var_mean, same numbers
        return _aten.batch_norm_update_stats(wide, None, None, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        var, mean = torch.var_mean(wide, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    return mean, var


def merge(shares: Sequence[Share]) -> Share:
    """The share of the whole from those of its pieces, with gradient."""
    total = sum(share.count for share in shares)
    parts = torch.tensor([[share.count / max(total, 1)] for share in shares], dtype=torch.float64, device="cpu")
    each_mean = torch.stack([share.mean for share in shares])
    parts = parts.to(each_mean.dtype).to(each_mean.device, non_blocking=True)  # else every layer waits for the device
    mean = (parts * each_mean).sum(0)
    var = (parts * (torch.stack([share.var for share in shares]) + (each_mean - mean).square())).sum(0)
    return Share(count=total, mean=mean, var=var)


def advance(call: Call, whole: Share) -> None:
    """Moves the running statistics of a call's layer towards the batch's; the variance is made unbiased."""
    with torch.no_grad():
        unbiased = whole.var * (whole.count / max(whole.count - 1, 1))
        for running, now in ((call.running_mean, whole.mean), (call.running_var, unbiased)):
            if running is not None:
                running.lerp_(now.to(running.dtype), call.momentum)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _wide(parameter: Tensor | None) -> Tensor | None:
    return parameter.float() if parameter is not None and parameter.dtype in HALF_DTYPES else parameter
