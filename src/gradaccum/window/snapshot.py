"""What running micro-batches changes besides gradients: random state and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


class RandomSeed:
    """A random stream of its own for each update, so that what comes after does not depend on how it was cut.

    With one stream, how many numbers an update draws would depend on its number of pieces; with sizes that are chosen
    by time, the data order of the next epoch would then depend on how busy the machine is. So the pieces of an update
    draw from generators seeded with one number of the CPU's stream, and afterwards all streams are one number further;
    or, where nothing was drawn, where they were.
    """

    def __init__(self) -> None:
        self._before = RandomState.now()
        stream = torch.Generator()
        stream.set_state(self._before.cpu)
        # CUDA generators use all of it, the CPU's 32 bits.
        self._seed = int(torch.randint(0, 1 << 62, (), generator=stream, device="cpu"))
        self._seeded = self._before

    def begin(self) -> None:
        """Seeds the generators, for the first attempt as for every other."""
        torch.default_generator.manual_seed(self._seed)
        for index in self._before.cuda:
            torch.cuda.default_generators[index].manual_seed(self._seed)
        self._seeded = RandomState.now()

    def end(self) -> None:
        """Leaves the generators one number further; untouched, where no piece drew anything."""
        drew = not self._seeded.equals(RandomState.now())
        self._before.restore()
        if drew:
            torch.randint(0, 1 << 62, (), device="cpu")
            for index in self._before.cuda:
                torch.rand((), device=f"cuda:{index}")

    def undo(self) -> None:
        """Leaves the generators as they were, for an update that was not made."""
        self._before.restore()


@dataclass(frozen=True, slots=True)
class Buffers:
    """Copies of the models' buffers, such as BatchNorm's running statistics."""

    places: Sequence[tuple[nn.Module, str, Tensor | None, Tensor | None]]

    @staticmethod
    def of(models: Iterable[nn.Module], *, only: Callable[[Tensor], bool] | None = None) -> Buffers:
        """Copies of buffers as they are: their module, name, and the tensor itself with its copy.

        Args:
            models: whose buffers.
            only: which ones to copy; all of them without it.
        """
        copies: dict[int, Tensor] = {}
        places: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        for model in models:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and only is not None and not only(buffer):
                        continue
                    if buffer is not None and id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    places.append((module, name, buffer, None if buffer is None else copies[id(buffer)]))
        return Buffers(places)

    def restore(self, *, among: Buffers | None = None) -> None:
        """Puts the values back into the buffers, and the buffers into their modules, which may have got others.

        Args:
            among: only in the places that are also these.
        """
        asked = None if among is None else {(id(module), name) for module, name, _, _ in among.places}
        with torch.no_grad():
            for module, name, buffer, copied in self.places:
                if asked is not None and (id(module), name) not in asked:
                    continue
                if buffer is not None and copied is not None:
                    buffer.copy_(copied)
                module._buffers[name] = buffer
