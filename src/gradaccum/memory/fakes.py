"""Tensors of a shape, a type and a device but no memory, and the kernels of which they keep the wrong bytes.

Under `FakeTensorMode` torch computes shapes only. For most operations that tells what is allocated to the byte. Two
kinds of kernels are exceptions.

Fused recurrent kernels have a workspace that is laid out by the library that runs them, and is a multiple of the
output: to torch's fake kernels it has size 0. `WithWorkspaces` gives it a size, for T steps, N samples, I inputs, H
hidden, and 4 gates (LSTM), 3 (GRU) or 1 (plain):

    oneDNN LSTM     parts of 4HTN, 2M(T + 1)N three times, 2H(T + 1)N twice and H(T + 1)N values in whole pages, with
                    M = max(I, H). Fitted to oneDNN 3 in float32: 0 to 3% too much for 300 shapes.
    cuDNN           (gates + 2)HTN elements a layer and direction: what backward has to know, hidden states and cells
                    included. The library does not document it; not checked against a device.

CUDA's kernels, on a machine without CUDA. Fake tensors of a CUDA device run no backward there: torch 2.13 ends the
process (builds without CUDA) or fails in `GraphTask::stash_current_streams` (builds with it). So fake tensors of the
CPU stand in, which run the same operations but for those that choose their kernel by device. `AsOnCuda` replaces these.
What that makes of a GPT with 12 heads and 1,024 tokens:

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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.types import HALF_DTYPES

_PAGE_BYTES = 4096
_CUDNN_GATES = {0: 1, 1: 1, 2: 4, 3: 3}  # by the mode's number: relu, tanh, LSTM, GRU
_LARGEST_HEAD = 256  # features that a head may have for the flash kernel


def fake_mode() -> FakeTensorMode:
    """Under which real tensors that a loss function brings along (class weights) are taken as fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def can_be_faked(device: torch.device) -> bool:
    """Whether fake tensors of the device run forward and backward here: the CPU's, and those of a device that is there.

    Of another, torch ends the process; see above.
    """
    if device.type in ("cpu", "meta"):
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def fake_of(tensor: Tensor, *, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake tensor like one of a model; parameters stay parameters. The tensor's memory is not read."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return mode.from_tensor(tensor)
    with mode:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def fake_input(tensor: Tensor, *, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake tensor like one of a micro-batch, in memory of its own: as many bytes as it has rows, not its batch's."""
    if tensor.layout is not torch.strided or tensor.requires_grad:
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class WithWorkspaces(TorchDispatchMode):
    """Gives the workspaces of fused recurrent kernels their size; to be entered after the fake mode."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default:
            *rest, workspace = result
            return (*rest, workspace.new_empty(_onednn_bytes(*args), dtype=torch.uint8))
        if func is torch.ops.aten._cudnn_rnn.default:
            *rest, reserve, weights = result
            return (*rest, reserve.new_empty(_cudnn_bytes(rest[0], *args), dtype=torch.uint8), weights)
        return result


def _onednn_bytes(*args: Any) -> int:
    source, hidden, is_training = args[0], args[10], args[15]
    if not is_training:
        return 0
    steps, samples, inputs = source.shape  # time first: nn.LSTM has seen to it
    states = (steps + 1) * samples
    widest = _row_length(max(inputs, hidden))
    parts = [steps * samples * _row_length(4 * hidden), states * _row_length(hidden)]
    parts += 3 * [2 * states * widest] + 2 * [2 * states * hidden]
    return sum(-(-4 * part // _PAGE_BYTES) * _PAGE_BYTES for part in parts)


def _row_length(values: int) -> int:
    """Floats that oneDNN sets aside for a row: whole cache lines, and not a multiple of 256 (get_good_ld)."""
    length = -(-values // 16) * 16
    return length + 16 if length % 256 == 0 else length


def _cudnn_bytes(output: Tensor, *args: Any) -> int:
    mode, hidden_size, num_layers, dropout, is_training = args[6], args[7], args[9], args[11], args[12]
    if not is_training:
        return 0
    steps_of_samples = output.numel() // output.shape[-1]
    directions = output.shape[-1] // hidden_size
    values = (_CUDNN_GATES[mode] + 2) * hidden_size * directions * num_layers
    if dropout:
        values += hidden_size * directions * (num_layers - 1)
    return values * steps_of_samples * output.element_size()


class AsOnCuda(TorchFunctionMode):
    """Has functions of CPU tensors keep what those of CUDA would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = _STAND_INS.get(func)
        result = None if stand_in is None else stand_in(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result  # where it cannot take the arguments


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
    is_usual = all(tensor.dim() == 4 and tensor.dtype == query.dtype for tensor in tensors)
    if not is_usual or not any(tensor.requires_grad for tensor in tensors):
        return None
    is_half = query.dtype in HALF_DTYPES
    if is_half and attn_mask is None and query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


_STAND_INS: dict[Any, Callable[..., Tensor | None]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
}
