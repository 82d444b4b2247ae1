"""The kernels of CUDA on a machine without CUDA, as far as they keep something else for backward than the CPU's.

Fake tensors of a CUDA device run no backward where there is none: torch 2.13 ends the process (builds without CUDA) or
fails in `GraphTask::stash_current_streams` (builds with it). So fake tensors of the CPU stand in, which run the same
operations but for those that choose their kernel by device. What that makes of a GPT with 12 heads and 1,024 tokens:

    attention       the CPU has no fused kernel with dropout, and keeps the weights of all pairs of tokens: 25 times as
                    much. Here it is the flash kernel (half precision, no mask) or the memory-efficient one, as on CUDA.
    dropout         the CPU keeps a mask of floats; here it is one of bools.
    optimizers      take all parameters at once (foreach), with temporaries for all.

Not replaced: attention inside `nn.MultiheadAttention` (too much is counted where it has dropout), cuDNN's recurrent
kernels (oneDNN's keep more), and ``torch.autocast("cuda")``, which torch itself turns off where there is no CUDA:
write ``torch.autocast(x.device.type)``. Built after ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

_LARGEST_HEAD = 256  # features that a head may have for the flash kernel


class AsOnCuda(TorchFunctionMode):
    """Has functions of CPU tensors keep what those of CUDA would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the stand-in of the function, where there is one and it can take the arguments."""
        stand_in = _STAND_INS.get(func)
        result = None if stand_in is None else stand_in(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def step_as_on_cuda(optimizer: Optimizer) -> None:
    """Sets what the optimizer would choose by itself on CUDA."""
    for group in optimizer.param_groups:
        if group.get("foreach", ...) is None and not group.get("fused"):
            group["foreach"] = True


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    if not training or inplace or not 0.0 < p < 1.0:
        return None
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    tensors = (query, key, value)
    if any(tensor.dim() != 4 or tensor.dtype != query.dtype for tensor in tensors):
        return None
    if not any(tensor.requires_grad for tensor in tensors):
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, float("-inf"))
        bias = bias.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


_STAND_INS: dict[Any, Callable[..., Tensor | None]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
}
