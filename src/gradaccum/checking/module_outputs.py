"""What every module returned, in two runs of the same samples: the first one that depends on how they were cut.

Hooks on all modules, also on those that no model owns, keep copies of inputs and outputs. Modules finish from the
inside out, so the first whose outputs differ although its inputs agree is the one that couples samples; if it is a
whole model, its own forward does. Outputs are compared where they have rows: a dimension along which the pieces make up
the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import tree
from gradaccum.checking.one_look import is_within


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module."""

    module: int  # its id
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(slots=True)
class Forward:
    """The calls of one forward, in the order in which they ended, and the gradients on what the models returned."""

    calls: list[ModuleCall] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Recording:
    """The forwards of one run, in the order in which they began, and the dtypes that it computed in."""

    forwards: list[Forward] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def begin(self) -> None:
        """A forward begins."""
        self.forwards.append(Forward())

    @contextmanager
    def held(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Context manager in which modules are recorded."""
        roots = {id(model) for model in models}

        def returned(module: nn.Module, args: Any, output: Any) -> None:
            if not self.forwards or not is_within():
                return
            forward = self.forwards[-1]
            outputs = _tensors(output)
            forward.calls.append(ModuleCall(id(module), _copies(_tensors(args)), _copies(outputs)))
            if id(module) in roots:
                for one in outputs:
                    if one.requires_grad:
                        one.register_hook(lambda gradient: forward.gradients.append(gradient.detach().clone()))

        handle = register_module_forward_hook(returned)
        try:
            with _Dtypes(self.dtypes):
                yield
        finally:
            handle.remove()


class _Dtypes(TorchDispatchMode):
    """Notes the floats that operations return: autocast may be on where no module is, or inside of a vmap."""

    supports_higher_order_operators = True

    def __init__(self, found: set[torch.dtype]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, Tensor) and returned.is_floating_point():
            self._found.add(returned.dtype)
        return returned


def first_difference(
    whole: Forward, parts: Sequence[Forward], sizes: Sequence[int], *, tolerance: float
) -> tuple[int, float] | None:
    """The id of the first module whose outputs differ although its inputs agree, and by how much; None without one."""
    calls = [_by_number(one.calls) for one in parts]
    for key, call in _by_number(whole.calls).items():
        if not all(key in others for others in calls):
            continue
        ours = [others[key] for others in calls]
        found = _largest_difference(call.outputs, [one.outputs for one in ours], sizes)
        if found <= tolerance:
            continue
        if _largest_difference(call.inputs, [one.inputs for one in ours], sizes) <= tolerance:
            return call.module, found
    return None


def are_gradients_alike(whole: Forward, parts: Sequence[Forward], sizes: Sequence[int], *, tolerance: float) -> bool:
    """Whether the loss hands the models' outputs the same gradient, but for one factor; False where none was seen."""
    if not whole.gradients or any(len(one.gradients) != len(whole.gradients) for one in parts):
        return False
    for i, expected in enumerate(whole.gradients):
        made = _joined(expected, [one.gradients[i] for one in parts], sizes)
        if made is None:
            return False
        made, expected = made.double().flatten(), expected.double().flatten()
        norms = made.norm() * expected.norm()
        if norms > 0 and 1 - float((made @ expected) / norms) > tolerance:
            return False
    return True


def _by_number(calls: Sequence[ModuleCall]) -> dict[tuple[int, int], ModuleCall]:
    """Calls by module, and the how manieth of it: which modules run may depend on the samples."""
    counts: dict[int, int] = {}
    found: dict[tuple[int, int], ModuleCall] = {}
    for call in calls:
        counts[call.module] = counts.get(call.module, 0) + 1
        found[call.module, counts[call.module]] = call
    return found


def _largest_difference(whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> float:
    largest = 0.0
    for i, expected in enumerate(whole):
        if not all(i < len(part) for part in parts):
            break
        made = _joined(expected, [part[i] for part in parts], sizes)
        if made is None:
            continue
        size = float(torch.linalg.vector_norm(expected.double()))
        off = float(torch.linalg.vector_norm(made.double() - expected.double()))
        if off > 0:
            largest = max(largest, off / size if size > 0 else 1.0)
    return largest


def _joined(whole: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | None:
    """The pieces' tensors along the dimension of the samples; None where they have none that can be seen."""
    rows = sum(sizes)
    if any(part.dim() != whole.dim() for part in parts):
        return None
    for dim in range(whole.dim()):
        each, rest = divmod(whole.shape[dim], rows)
        if rest or not each or any(p.shape[dim] != each * n for p, n in zip(parts, sizes, strict=True)):
            continue
        rest_of_shape = [size for i, size in enumerate(whole.shape) if i != dim]
        if all([size for i, size in enumerate(part.shape) if i != dim] == rest_of_shape for part in parts):
            return torch.cat(list(parts), dim)
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree.tensors(value) if one.is_floating_point() and type(one) in (Tensor, nn.Parameter)]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [one.detach().clone() for one in tensors]
