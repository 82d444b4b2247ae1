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

    def next_numbers(self, count: int) -> list[int]:
        """The numbers that the CPU's generator would give next; no generator moves."""
        generator = torch.Generator()
        generator.set_state(self.cpu)
        return torch.randint(0, 1 << 62, (count,), generator=generator, device="cpu").tolist()

    def seed(self, number: int) -> None:
        """Seeds the generators whose state this is."""
        torch.default_generator.manual_seed(number)  # of which it takes 32 bits, and CUDA's generators all
        for index in self.cuda:
            torch.cuda.default_generators[index].manual_seed(number)

    def advance(self, *, drew: bool) -> None:
        """Makes it the present state; all generators are one number further if anything was drawn meanwhile."""
        self.restore()
        if drew:
            torch.randint(0, 1 << 62, (), device="cpu")
            for index in self.cuda:
                torch.rand((), device=f"cuda:{index}")

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
        (self._seed,) = self._before.next_numbers(1)
        self._seeded = self._before

    def begin(self) -> None:
        """Seeds the generators, for the first attempt as for every other."""
        self._before.seed(self._seed)
        self._seeded = RandomState.now()

    def end(self) -> None:
        """Leaves the generators one number further; untouched, where no piece drew anything."""
        self._before.advance(drew=not self._seeded.equals(RandomState.now()))

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
