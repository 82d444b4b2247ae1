"""What running micro-batches changes besides gradients: random state and buffers. Taken before, to be put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of torch's generators: the CPU's, and that of every CUDA device in use."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @staticmethod
    def now() -> RandomState:
        """The present state. Devices that have never been used have none, and are not woken up."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        return RandomState(torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in devices})

    def restore(self) -> None:
        """Makes it the present state."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def equals(self, other: RandomState) -> bool:
        """Whether nothing has been drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and all(
            index in other.cuda and torch.equal(state, other.cuda[index]) for index, state in self.cuda.items()
        )


@dataclass(frozen=True, slots=True)
class Buffers:
    """Copies of the models' buffers, such as BatchNorm's running statistics."""

    places: Sequence[tuple[nn.Module, str, Tensor, Tensor]]

    @staticmethod
    def of(models: Iterable[nn.Module]) -> Buffers:
        """Copies of all buffers as they are: their module, name, and the tensor itself with its copy."""
        copies: dict[int, Tensor] = {}
        places: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for model in models:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        copied = copies.setdefault(id(buffer), buffer.detach().clone())
                        places.append((module, name, buffer, copied))
        return Buffers(places)

    def restore(self) -> None:
        """Puts the values back into the buffers, and the buffers into their modules, which may have got others."""
        with torch.no_grad():
            for module, name, buffer, copied in self.places:
                buffer.copy_(copied)
                module._buffers[name] = buffer
