"""Tensors of a shape, a type and a device but no memory, and the few kernels whose memory they cannot know.

Under `FakeTensorMode` torch computes shapes only. For most operations that tells what is allocated to the byte. An
exception are fused recurrent kernels, whose workspace is laid out by the library that runs them, and is a multiple of
the output: to torch's fake kernels it has size 0. `WithWorkspaces` gives it a size:

    oneDNN LSTM     parts of 4HTN, 2M(T + 1)N three times, 2H(T + 1)N twice and H(T + 1)N values in whole pages, with
                    M = max(I, H). Fitted to oneDNN 3 in float32: 0 to 3% too much for 300 shapes.
    cuDNN           (gates + 2)HTN elements a layer and direction: what backward has to know, hidden states and cells
                    included. The library does not document it; not checked against a device.

with T steps, N samples, I inputs, H hidden, and 4 gates (LSTM), 3 (GRU) or 1 (plain).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import tree

_PAGE_BYTES = 4096
_CUDNN_GATES = {0: 1, 1: 1, 2: 4, 3: 3}  # by the mode's number: relu, tanh, LSTM, GRU


def fake_mode() -> FakeTensorMode:
    """Under which real tensors that a loss function brings along (class weights) are taken as fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def can_be_faked(device: torch.device) -> bool:
    """Whether fake tensors of the device run forward and backward here: the CPU's, and those of a device that is there.

    Of another, torch ends the process; see `cuda_kernels`.
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
        if not isinstance(tensor, nn.Parameter):
            return fake
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)


def fake_micro_batch(batch: Any, size: int, *, mode: FakeTensorMode, device: torch.device) -> Any:
    """As many fake rows as asked for, more than the batch has if need be, in the batch's structure."""
    rows = tree.rows(batch)
    template = tree.take(batch, torch.arange(size) % rows if size > rows else slice(0, size))

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.layout is not torch.strided or leaf.requires_grad:
            return mode.from_tensor(leaf)
        with mode:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)

    return tree.map_leaves(template, fake)


class WithWorkspaces(TorchDispatchMode):
    """Gives the workspaces of fused recurrent kernels their size; to be entered after the fake mode."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, and makes its workspace anew."""
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
