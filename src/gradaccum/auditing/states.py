"""What a forward leaves behind in the model: buffers that advance with every micro-batch instead of every update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradaccum.auditing.task import Task


@dataclass(frozen=True, slots=True)
class State:
    """Copies of all buffers, by their module's name and their own."""

    buffers: dict[tuple[str, str], Tensor]
    places: Sequence[tuple[nn.Module, str, tuple[str, str]]]

    @staticmethod
    def of(task: Task) -> State:
        """The present state; a buffer of several modules counts under its first name."""
        buffers: dict[tuple[str, str], Tensor] = {}
        places: list[tuple[nn.Module, str, tuple[str, str]]] = []
        seen: set[int] = set()
        for where, module in task.modules().items():
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    buffers[where, name] = buffer.detach().clone()
                    places.append((module, name, (where, name)))
        return State(buffers, places)

    def restore(self) -> None:
        """Puts the values back, into tensors of their own: a graph may need those that are there."""
        for module, name, key in self.places:
            module._buffers[name] = self.buffers[key].clone()


def differences(one: State, other: State, *, tolerance: float) -> dict[tuple[str, str], float]:
    """Buffers that two runs left apart, with how far: the norm of the difference over that of the first."""
    found: dict[tuple[str, str], float] = {}
    for key, value in one.buffers.items():
        against = other.buffers.get(key)
        if against is None or against.shape != value.shape:
            found[key] = float("inf")
        elif not torch.equal(value, against):
            apart = relative(against, value)
            if apart > tolerance:
                found[key] = apart
    return found


def relative(made: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; infinite where that is zero or not finite."""
    expected, made = expected.to(torch.complex128), made.to(torch.complex128)
    size, apart = expected.abs().square().sum().sqrt().item(), (made - expected).abs().square().sum().sqrt().item()
    if apart == 0:
        return 0.0
    return apart / size if size > 0 and apart == apart else float("inf")
