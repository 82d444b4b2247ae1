"""What an optimizer holds and what its step takes, for any optimizer: a fake copy of it steps on fake parameters.

State is made at the first step, so nothing can be asked of an optimizer that has not stepped; and a formula for each
class would be wrong for the next one. The copy is torch's own deep copy, told beforehand what stands for each tensor.
Where the step asks a tensor for its number (Adafactor and Adagrad do, for how often they have stepped), it is told 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.memory.fakes import can_be_faked, fake_mode, fake_of
from gradaccum.memory.live_bytes import LiveBytes, num_bytes, tensors_in


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Bytes of all optimizers together."""

    state: int = 0  # what stays between updates
    step: int = 0  # what a step needs besides, at most
    unknown: tuple[str, ...] = ()  # classes whose step could not be run; they are counted as they are now


def optimizer_memory(
    optimizers: Sequence[Optimizer],
    *,
    device: torch.device | None = None,
    as_on_cuda: bool = False,
    rounded_to: int = 1,
) -> OptimizerMemory:
    """Counts state and temporaries of one step of each optimizer, which all parameters take part in.

    Neither the optimizers nor their parameters' memory is touched. Some run another kernel on another ``device``; with
    ``as_on_cuda`` it stands in for a CUDA device. Sizes are rounded as by `LiveBytes`.
    """
    state, step, unknown = 0, 0, list[str]()
    for optimizer in optimizers:
        try:
            state_of_one, step_of_one = _after_a_step(optimizer, device, as_on_cuda, rounded_to)
        except Exception:  # noqa: BLE001  # a step that needs numbers, a closure, or a kernel that knows no fakes
            state_of_one, step_of_one = num_bytes(tensors_in(optimizer.state)), 0
            unknown.append(type(optimizer).__name__)
        state += state_of_one
        step = max(step, step_of_one)
    return OptimizerMemory(state, step, tuple(unknown))


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    """Its parameters and its state as it is now."""
    return tensors_in([optimizer.param_groups, optimizer.state])


def _after_a_step(
    optimizer: Optimizer, device: torch.device | None, as_on_cuda: bool, rounded_to: int
) -> tuple[int, int]:
    mode = fake_mode()
    fakes = _fakes(optimizer, mode, device)
    parameters = [fakes[id(p)] for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    with mode:
        memo: dict[int, Any] = dict(fakes)
        clone: Optimizer = copy.deepcopy(optimizer, memo)  # without the hooks
        # What a class of its own adds is not in torch's copy. An attribute ``step`` is the wrapper of a learning-rate
        # schedule, which counts the calls.
        for name, value in vars(optimizer).items():
            if name not in vars(clone) and name != "step":
                setattr(clone, name, copy.deepcopy(value, memo))
        for group in clone.param_groups:
            if as_on_cuda and group.get("foreach", ...) is None and not group.get("fused"):
                group["foreach"] = True  # which the optimizer would choose on CUDA
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        before = num_bytes(tensors_in(clone.state))
        with torch.enable_grad(), _MadeUpNumbers(), LiveBytes(rounded_to=rounded_to) as live:
            clone.step()
    return before + live.current, live.peak - live.current


class _MadeUpNumbers(TorchDispatchMode):
    """Has a number for every fake tensor that is asked for it: what an optimizer allocates seldom depends on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype != torch.bool and 1


def _fakes(optimizer: Optimizer, mode: FakeTensorMode, device: torch.device | None) -> dict[int, Tensor]:
    """By the id of each tensor of the optimizer, parameters without their gradients, what stands for it."""
    fakes: dict[int, Tensor] = {}
    for tensor in tensors_of(optimizer):
        where = tensor.device if device is None or tensor.dim() == 0 else device
        if not can_be_faked(where):
            raise NotImplementedError(f"this build of torch does not know the device {where}")
        fakes[id(tensor)] = fake_of(tensor, mode=mode, device=where)
    return fakes
