"""Where activations wait for the backward: in the host's memory, or not at all.

One after another, they are one micro-batch's; in lockstep, the whole batch's.

Host (`HostMemory`). Tensors that autograd saves are copied out as they are saved and copied back when the backward
wants them. On CUDA the copies go to and from pinned memory on a stream of their own: out while the forward goes on, and
back ahead of need, in the reverse of the order in which they were saved: the order of the backward, but for branches.
The idea is that of torch.autograd.graph.save_on_cpu, which copies all of it in the stream that computes.

Not copied: parameters and buffers, which stay anyway; tensors below `MIN_BYTES`, whose copy costs more than it frees;
tensors that are not dense. A tensor that is saved twice (BatchNorm's input is needed for the statistics and for
normalising) is copied once. Two saves are of one tensor if storage, place in it, and version are the same; the storage
is known by a weak reference, not by its address: memory that has been freed and used again has the same address and
other values, which made a gradient wrong by half in a prototype.

Recompute (`recomputed`). With each block behind a checkpoint (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost", arXiv 1604.06174) what waits for the backward is the blocks' inputs, and what one block makes while it is
run again. A block is a child of a ``Sequential`` or a ``ModuleList`` that has children itself: a residual block, a
transformer layer. Where blocks nest, that level is taken with the least, counted in layers as if each made as much,

    blocks + layers outside of blocks + layers of the largest block

Layers over the batch meet nobody while they are run again: they take what their forward had got (`batch_norm.exact`).
Other state is the same in both runs: random draws by torch, and buffers here. The second run gets copies of what the
first one found, so spectral norm computes the same weight again and running statistics advance once. Buffers of more
than `ALWAYS_COPIED` elements are taken to stay as they are. Layers of Transformers get no key-value cache, which a
second run would append to.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaccum.errors import UnsupportedError
from gradaccum.types import Activations
from gradaccum.window.snapshot import ALWAYS_COPIED

logger = logging.getLogger("gradaccum")

MIN_BYTES = 1 << 16
AHEAD_BYTES = 1 << 28  # on their way back before they are wanted: a few layers' worth
_MAX_LOOKED_AT = 64
_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})  # parameters of Transformers' layers


class Transfer(Protocol):
    """Copies tensors between device and host."""

    def out(self, tensor: Tensor) -> Any:
        """A copy of the tensor outside of the device's memory."""
        ...

    def back(self, host: Any) -> Callable[[], Tensor]:
        """Starts copying that back to the device; what it returns gives the tensor, and waits for its values."""
        ...


@dataclass(eq=False, kw_only=True)
class Kept:
    """A saved tensor in host memory."""

    host: Any  # what `Transfer.out` returned
    index: int  # how many were saved before it
    num_bytes: int
    arrive: Callable[[], Tensor] | None = None  # what `Transfer.back` returned, while it is on its way ahead of need


class HostMemory:
    """Hooks that keep the tensors that one batch saves in host memory, but for parameters and buffers of the models."""

    def __init__(
        self,
        models: Iterable[nn.Module],
        transfer: Transfer,
        *,
        min_bytes: int = MIN_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
        types: Sequence[type[Tensor]] = (Tensor, nn.Parameter),
    ) -> None:
        self._transfer = transfer
        self._types = types
        self._min_bytes = min_bytes
        self._ahead_bytes = ahead_bytes
        stay = [
            tensor.untyped_storage()
            for model in models
            for tensors in (model.parameters(), model.buffers())
            for tensor in tensors
            if tensor.layout is torch.strided
        ]
        self._stay = {id(storage): storage for storage in stay}  # alive, so that no id is used twice
        self._copied: WeakKeyDictionary[UntypedStorage, WeakValueDictionary[Any, Kept]] = WeakKeyDictionary()
        self._order: list[weakref.ref[Kept]] = []

    def held(self) -> AbstractContextManager[None]:
        """Context manager in which what this thread saves is copied out."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept for a saved tensor."""
        if tensor.layout is not torch.strided or type(tensor) not in self._types:
            return tensor
        storage = tensor.untyped_storage()
        # An expanded tensor is larger than its memory: a copy would be, too.
        if not self._min_bytes <= tensor.nbytes <= storage.nbytes() or id(storage) in self._stay:
            return tensor
        copies = self._copied.setdefault(storage, WeakValueDictionary())
        key = tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        kept = copies.get(key)
        if kept is None:
            kept = Kept(host=self._transfer.out(tensor.detach()), index=len(self._order), num_bytes=tensor.nbytes)
            copies[key] = kept
            self._order.append(weakref.ref(kept))
        return kept

    def unpack(self, kept: Tensor | Kept) -> Tensor:
        """The saved tensor, back on the device."""
        if isinstance(kept, Tensor):
            return kept
        arrive = self._transfer.back(kept.host) if kept.arrive is None else kept.arrive
        kept.arrive = None
        on_its_way = 0
        # What was saved before that is wanted next.
        for reference in reversed(self._order[max(0, kept.index - _MAX_LOOKED_AT) : kept.index]):
            ahead = reference()
            if ahead is None:
                continue
            on_its_way += ahead.num_bytes
            if on_its_way > self._ahead_bytes:
                break
            if ahead.arrive is None:
                ahead.arrive = self._transfer.back(ahead.host)
        return arrive()


class CudaTransfer:
    """A `Transfer` by pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> Any:
        """See `Transfer`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to others before it has been read
        return host

    def back(self, host: Any) -> Callable[[], Tensor]:
        """See `Transfer`; behind the copies out, since they share the stream."""
        with torch.cuda.stream(self._stream):
            tensor = host.to(self._device, non_blocking=True)
            sent = self._stream.record_event()

        def arrive() -> Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent)
            tensor.record_stream(current)
            return tensor

        return arrive


def find_blocks(models: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of the models that are worth running again; none is part of another.

    Raises:
        UnsupportedError: there are none.
    """
    many = list(models)
    level = [block for model in many for block in _outermost(model)]
    levels: list[list[nn.Module]] = []
    while level:
        levels.append(level)
        inner = [_outermost(block) for block in level]
        if not any(inner):
            break
        level = [found for block, within in zip(level, inner, strict=True) for found in (within or [block])]
    if not levels:
        raise UnsupportedError(
            'activations="recompute" runs the repeated blocks of the model again in the backward, and found none: no '
            "nn.Sequential or nn.ModuleList has children that are made of layers themselves. Nothing would be saved. "
            'Use activations="host", or torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in the model.'
        )
    return min(levels, key=_layers_alive)


@contextmanager
def recomputed(models: Sequence[nn.Module], *, is_exact: bool = False) -> Iterator[None]:
    """Context manager in which the blocks of the models keep only their inputs, and run again in the backward.

    With ``is_exact`` BatchNorm layers are `batch_norm.exact`'s, which knows them by their buffers.

    Raises:
        UnsupportedError: there are no blocks.
    """
    with ExitStack() as undone:
        for block in find_blocks(models):
            # On the instance, past hooks, which stay outside.
            undone.enter_context(_set(block, forward=_Again(block, is_exact)))
        yield


@contextmanager
def waiting(
    models: Sequence[nn.Module], activations: Activations, device: torch.device, *, memory: HostMemory | None = None
) -> Iterator[None]:
    """Context manager in which micro-batches run forward and backward with their activations where they are to wait.

    The host is that of the device, or ``memory``.

    Raises:
        UnsupportedError: they are to be recomputed, and the models have no blocks.
    """
    with ExitStack() as held:
        if activations == "recompute":
            held.enter_context(recomputed(models))
        elif activations == "host":
            memory = host_memory(models, device) if memory is None else memory
            held.enter_context(nullcontext() if memory is None else memory.held())
        yield


def host_memory(models: Sequence[nn.Module], device: torch.device) -> HostMemory | None:
    """The host as a place for what is saved on a device; None where it is the device."""
    if device.type == "cuda":
        return HostMemory(models, CudaTransfer(device))
    logger.info('activations="host" changes nothing here: the model is on the %s already', device.type)
    return None


@contextmanager
def _set(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Sets attributes of an instance for a while; not by ``setattr``, which lockstep takes for a micro-batch's own."""
    before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]
        module.__dict__.update(before)


class _Again:
    """The forward of a block, of which only the inputs are kept."""

    def __init__(self, block: nn.Module, is_exact: bool) -> None:
        self._block, self._forward, self._is_exact = block, block.forward, is_exact
        names = enumerate(inspect.signature(block.forward).parameters)
        self._caches = {key for at, name in names if name in _CACHES for key in (at, name)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.utils.checkpoint import checkpoint  # only here: training without it does not wait for the import

        given = {at: value for at, value in (*enumerate(args), *kwargs.items()) if at in (self._caches | _CACHES)}
        for at, value in given.items():
            if hasattr(value, "get_seq_length"):
                given[at] = self._without(value)
        args = tuple(given.get(at, value) for at, value in enumerate(args))
        kwargs = {name: given.get(name, value) for name, value in kwargs.items()}
        again = _BuffersOfBefore(self._block, self._is_exact)
        return checkpoint(
            self._forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs
        )

    def _without(self, cache: Any) -> None:
        length = cache.get_seq_length()
        if length:
            raise UnsupportedError(
                f'activations="recompute" runs a {type(self._block).__name__} again in the backward, and its key-value '
                f"cache has {length} tokens before its own: the second run would append to it once more, and without "
                'it the model is another one. Use activations="host", or leave the cache out.'
            )


class _BuffersOfBefore:
    """Context manager in which a block has copies of the buffers that it had when this was made.

    Copies take their places: written back instead, what autograd has saved of the buffers would have changed. It may be
    entered more than once, as a graph may be read before its backward.
    """

    def __init__(self, block: nn.Module, is_exact: bool) -> None:
        self._before = [
            (module, name, buffer.detach().clone())
            for module in block.modules()
            if not (is_exact and isinstance(module, _BatchNorm))
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel() <= ALWAYS_COPIED
        ]
        self._own: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._own = [module._buffers[name] for module, name, _ in self._before]
        for module, name, before in self._before:
            module._buffers[name] = before.clone()

    def __exit__(self, *raised: object) -> None:
        for (module, name, _), buffer in zip(self._before, self._own, strict=True):
            module._buffers[name] = buffer
        self._own = []


def _outermost(module: nn.Module) -> list[nn.Module]:
    """The composite children of containers within, none part of another."""
    found: list[nn.Module] = []
    for child in module.children():
        is_composite = next(child.children(), None) is not None
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and is_composite:
            found.append(child)
        else:
            found.extend(_outermost(child))
    return list(dict.fromkeys(found))


def _num_layers(module: nn.Module) -> int:
    return sum(next(part.children(), None) is None for part in module.modules())


def _layers_alive(blocks: Sequence[nn.Module]) -> int:
    # Without the number of all layers of the models, which is the same at every level.
    sizes = [_num_layers(block) for block in blocks]
    return len(blocks) - sum(sizes) + max(sizes)
