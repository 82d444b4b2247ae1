"""What running micro-batches changes besides gradients: random state and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradaccum.errors import ReplayError


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

    def end(self) -> bool:
        """Leaves the generators one number further; untouched, where no piece drew anything. Whether one did."""
        drew = not self._seeded.equals(RandomState.now())
        self._before.advance(drew=drew)
        return drew

    def undo(self) -> None:
        """Leaves the generators as they were, for an update that was not made."""
        self._before.restore()


ALWAYS_COPIED = 1 << 16
"""Elements of buffers that are copied whatever is known of them.

In-place operations count versions, but the kernels of BatchNorm write to its statistics without.
"""


class Place(NamedTuple):
    """One buffer of a module: the tensor itself, its copy where there is one, and what says that it was written."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    copied: Tensor | None
    version: int

    @property
    def was_written(self) -> bool:
        """Whether an operation in place has written to the tensor since."""
        return self.buffer is not None and _version(self.buffer) != self.version


@dataclass(frozen=True, slots=True)
class Buffers:
    """The models' buffers, such as BatchNorm's running statistics, and copies of those that may be written."""

    places: Sequence[Place]
    names: Sequence[tuple[nn.Module, frozenset[str]]] = ()  # of all buffers there were, by module

    @staticmethod
    def of(
        models: Iterable[nn.Module],
        *,
        only: Callable[[Tensor], bool] | None = None,
        copy: Callable[[nn.Module, str, Tensor], Tensor | None] | None = None,
    ) -> Buffers:
        """Buffers as they are: their module, name, and the tensor itself with its copy.

        Args:
            models: whose buffers.
            only: which ones are noted at all; all of them without it, and then also that there were no others.
            copy: makes the copy of one, or none; of all of them without it.
        """
        done: dict[int, Tensor | None] = {}
        places: list[Place] = []
        names: list[tuple[nn.Module, frozenset[str]]] = []
        for model in models:
            for module in model.modules():
                if only is None:
                    names.append((module, frozenset(module._buffers)))
                for name, buffer in module._buffers.items():
                    if buffer is None:
                        places.append(Place(module, name, None, None, 0))
                    elif only is None or only(buffer):
                        if id(buffer) not in done:
                            done[id(buffer)] = _copy(buffer) if copy is None else copy(module, name, buffer)
                        places.append(Place(module, name, buffer, done[id(buffer)], _version(buffer)))
        return Buffers(places, names)

    def restore(self, *, among: Buffers | None = None) -> None:
        """Puts the values back into the buffers, and the buffers into their modules, which may have got others.

        Buffers that were registered since go, unless only some were noted.

        Args:
            among: only in the places that are also these.

        Raises:
            ReplayError: one was written that has no copy.
        """
        asked = None if among is None else {(id(place.module), place.name) for place in among.places}
        lost: list[Place] = []
        with torch.no_grad():
            for place in self.places:
                if asked is not None and (id(place.module), place.name) not in asked:
                    continue
                if place.buffer is not None and place.copied is not None:
                    _write(place.buffer, place.copied)
                elif place.was_written:
                    lost.append(place)
                place.module._buffers[place.name] = place.buffer
        for module, names in self.names if among is None else ():
            for name in module._buffers.keys() - names:
                delattr(module, name)
        if lost:
            raise _not_copied(lost[0])


class ChangingBuffers:
    """Which buffers forwards were seen to write, over a run; the others are not copied.

    A large buffer (a queue, a codebook, a quantised weight) is copied the first time it is met, and after that only if
    it was written meanwhile: 200 MB that nobody writes took 83 ms an update. One that is written for the first time
    later, and in the very update that has to be run again, cannot be put back: an error. Not seen: large buffers that
    are written to behind torch's back, by ``.data`` or a kernel of one's own.
    """

    def __init__(self) -> None:
        self._is_written: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()

    def copied(self, models: Iterable[nn.Module]) -> Buffers:
        """The buffers as they are, with copies of those that forwards may write."""
        return Buffers.of(models, copy=self._copy)

    def seen(self, buffers: Buffers) -> None:
        """Forwards have run since these were noted."""
        for place in buffers.places:
            if place.buffer is not None and place.buffer.numel() > ALWAYS_COPIED:
                known = self._is_written.setdefault(place.module, {})
                known[place.name] = known.get(place.name, False) or place.was_written

    def _copy(self, module: nn.Module, name: str, buffer: Tensor) -> Tensor | None:
        if buffer.numel() <= ALWAYS_COPIED:
            return _copy(buffer)
        is_written = self._is_written.get(module, {}).get(name)
        if is_written is None:  # most are never written; the device's memory may be what is short
            return _memory_of(buffer.detach()).to("cpu", copy=True)
        return _copy(buffer) if is_written else None


def _copy(buffer: Tensor) -> Tensor:
    return _memory_of(buffer.detach()).clone()


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version  # inference tensors have none


def _memory_of(buffer: Tensor) -> Tensor:
    """The elements that an expanded tensor really has: torch refuses to write to it, but not to what it is made of."""
    if buffer.layout != torch.strided or 0 not in buffer.stride():
        return buffer
    return buffer[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())]


def _write(buffer: Tensor, values: Tensor) -> None:
    memory = _memory_of(buffer.detach())
    if not buffer.is_inference():
        memory.copy_(values)
    elif not torch.equal(
        memory, values.to(memory.device)
    ):  # only code that is in inference mode itself can have written to it
        with torch.inference_mode():
            memory.copy_(values)


def _not_copied(place: Place) -> ReplayError:
    buffer = place.buffer
    assert buffer is not None, "only buffers are written to"
    return ReplayError(
        f"The buffer {place.name!r} of {type(place.module).__name__}, of shape {tuple(buffer.shape)}, was changed by a "
        "forward for the first time, and that forward's batch has to be run again. Buffers of more than "
        f"{ALWAYS_COPIED:,} elements that no forward has changed so far are not copied, so it cannot be put back: run "
        "again, the batch would find what it has left there itself. No update was made. Set the buffer to what it was "
        "and call again: from now on it is copied. Or pass a smaller micro_batch_size, with which nothing is run again."
    )
