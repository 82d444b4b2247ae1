"""How many bytes of tensors are alive: counted op by op, or asked of the allocator where there is one that counts.

`LiveBytes` sees every operation below autograd and keeps a weak reference to each storage that an operation allocates.
Storages, not tensors: views share theirs, and autograd's saved tensors, which Python never sees, hold on to theirs.
torch keeps the Python object of a storage alive as long as the storage itself, so a weak reference to it ends when the
memory is given back, in whatever thread that is. Fake tensors have storages with a size and no memory: counted alike.

What is counted is what was allocated between two operations. Not counted: what an operation allocates and frees inside
itself (a convolution's workspace), rounding and fragmentation by the allocator, memory that is not torch's (numpy's,
NCCL's), what was there before, and a resize of that before any operation has used it. Code that torch.compile compiled
allocates unseen, so it runs eagerly meanwhile.

On CUDA `measured_peak` asks the caching allocator instead, which sees all of torch's memory and costs nothing. Counting
costs about 10 us an operation: never count and measure time in one run. `graph_bytes` counts what autograd has saved.

The idea is that of torch.distributed._tools.mem_tracker, which needs hooks on modules and optimizers besides.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class AllocatorBytes:
    """The caching allocator's own count of a CUDA device, with the attributes of `LiveBytes`.

    Blocks that are kept for later are not in it. The allocator counts when memory is asked for, not when the device
    uses it, so nothing has to be waited for. It resets the device's peak statistics.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._final: tuple[int, int] | None = None

    def __enter__(self) -> AllocatorBytes:
        self._before, self._final = torch.cuda.memory_allocated(self._device), None
        self.reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self._final = (self.current, self.peak)

    @property
    def current(self) -> int:
        """Bytes taken now, beyond what was taken at the start."""
        return self._final[0] if self._final else torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        """The largest that `current` has been since the start, or since `reset_peak`."""
        return self._final[1] if self._final else torch.cuda.max_memory_allocated(self._device) - self._before

    def reset_peak(self) -> None:
        """Has `peak` start over from `current`."""
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(slots=True, eq=False)
class _Allocation:
    """A storage that is watched."""

    reference: weakref.ref[UntypedStorage]
    bytes_before: int  # what it had when first seen: 0 for one that an operation has made
    bytes: int = 0  # what is counted for it
    outer_resize: Callable[[int], Any] | None = None  # where another counter watches the storage too


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of storages which operations allocate while it is on.

    It follows the backward into the engine's threads. Storages that die after it is off are no longer counted off.
    Every size is rounded up to a multiple of ``rounded_to``, as an allocator would: 512 on CUDA.
    """

    supports_higher_order_operators = True

    def __init__(self, *, rounded_to: int = 1) -> None:
        super().__init__()
        self._rounded_to = rounded_to
        # By the id of the storage, which may be another's as soon as it is dead. It may die at any time: in a thread of
        # the backward, or in the middle of a line below. Whoever learns of it only leaves the id in `_freed`, which
        # takes no lock, and `_freed` is read before anything is looked up.
        self._allocations: dict[int, _Allocation] = {}
        self._freed: deque[int] = deque()
        self._lock = threading.Lock()
        self._current = self._peak = 0
        self._eagerly = ExitStack()

    @property
    def current(self) -> int:
        """Bytes taken now, beyond what was taken at the start; less than 0 where more was given back."""
        with self._lock:
            self._forget_freed()
            return self._current

    @property
    def peak(self) -> int:
        """The largest that `current` has been since the start, or since `reset_peak`; readable at the end too."""
        return self._peak

    def reset_peak(self) -> None:
        """Has `peak` start over from `current`."""
        self._peak = self.current

    def __enter__(self) -> LiveBytes:
        if "torch._dynamo" in sys.modules:  # something may be compiled; importing it for nothing takes a second
            self._eagerly.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._eagerly.close()
        for allocation in list(self._allocations.values()):
            storage = allocation.reference()
            if storage is not None:
                del vars(storage)["resize_"]
                if allocation.outer_resize is not None:
                    vars(storage)["resize_"] = allocation.outer_resize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(storage): (storage, storage.nbytes()) for storage in storages_in((args, kwargs))}
        result = func(*args, **kwargs)
        # Those that have not been seen before as well, so that a resize of theirs is noticed.
        seen = [
            (storage, before)
            for key, (storage, before) in given.items()
            if key not in self._allocations or storage.nbytes() != before
        ]
        if func is torch.ops.aten.lift_fresh.default:
            given, seen = {}, []  # the new tensor of torch.tensor([...]), which no operation has returned before
        seen += [(storage, 0) for storage in storages_in(result) if id(storage) not in given]
        if seen:
            self._count(seen)
        return result

    def _count(self, storages: list[tuple[UntypedStorage, int]]) -> None:
        """Takes note of storages, each with the bytes it had before."""
        with self._lock:
            self._forget_freed()
            for storage, bytes_before in storages:
                allocation = self._allocations.get(id(storage))
                if allocation is None:
                    allocation = self._watch(storage, bytes_before)
                size = self._rounded(storage.nbytes()) - self._rounded(allocation.bytes_before)
                self._current += size - allocation.bytes
                allocation.bytes = size
            self._peak = max(self._peak, self._current)

    def _watch(self, storage: UntypedStorage, bytes_before: int) -> _Allocation:
        key, freed = id(storage), self._freed  # a reference to `self` would keep the counter as long as any storage
        reference = weakref.ref(storage, lambda _: freed.append(key))
        allocation = self._allocations[key] = _Allocation(reference, bytes_before)
        # No operation is dispatched for `storage.resize_(n)`, with which FSDP frees parameters, so the method is
        # shadowed in the attributes of this one storage. torch keeps them for as long as the storage itself.
        allocation.outer_resize = vars(storage).get("resize_")
        vars(storage)["resize_"] = _counting_resize(allocation, weakref.WeakMethod(self._count))
        return allocation

    def _forget_freed(self) -> None:
        while self._freed:
            self._current -= self._allocations.pop(self._freed.popleft()).bytes

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._rounded_to) * self._rounded_to


def _counting_resize(allocation: _Allocation, count: weakref.WeakMethod[Callable[..., None]]) -> Callable[[int], Any]:
    """What takes the place of a storage's own method. It keeps neither the storage nor the counter alive."""
    reference, outer = allocation.reference, allocation.outer_resize

    def resize_(size: int) -> Any:
        storage, counted = reference(), count()
        assert storage is not None
        before = storage.nbytes()
        result = UntypedStorage.resize_(storage, size) if outer is None else outer(size)
        if counted is not None:
            counted([(storage, before)])
        return result

    return resize_


Meter = AllocatorBytes | LiveBytes


def measured_peak(device: torch.device) -> Meter:
    """A context manager that measures the memory which torch's tensors on a device take.

    CUDA counts by its allocator, whose peak statistics are reset; every other device op by op, which sees the tensors
    of all devices.
    """
    return AllocatorBytes(device) if device.type == "cuda" else LiveBytes()


@dataclass(slots=True)
class GraphBytes:
    """The bytes of the storages that autograd has saved for backward so far, each counted once."""

    count: int = 0


@contextmanager
def graph_bytes(not_counted: Iterable[Tensor]) -> Iterator[GraphBytes]:
    """Context manager that counts what forwards save for their backward.

    The same on every device, and it costs about a microsecond a saved tensor. What checkpoints save is counted, what
    they will recompute is not, nor are parameters, buffers and inputs, whose memory is in use in any case.
    """
    saved = GraphBytes()
    seen = {id(storage) for storage in storages_in(list(not_counted))}

    def pack(tensor: Tensor) -> Tensor:
        for storage in storages_of(tensor):
            if id(storage) not in seen:  # all of them are alive, so no id is used twice
                seen.add(id(storage))
                saved.count += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of tensors; what they share counts once."""
    storages = {id(storage): storage for storage in storages_in(list(tensors))}
    return sum(storage.nbytes() for storage in storages.values())


def tensors_in(values: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts; not their keys."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storages_in(values: Any) -> Iterator[UntypedStorage]:
    """The storages of every tensor in nested lists, tuples and dicts."""
    for tensor in tensors_in(values):
        yield from storages_of(tensor)


def storages_of(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The memory of a tensor: one storage, several for sparse tensors and wrappers, none for opaque ones."""
    if is_traceable_wrapper_subclass(tensor):
        yield from storages_in([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    else:
        for name in _SPARSE_PARTS.get(tensor.layout, ()):
            yield getattr(tensor, name)().untyped_storage()


_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
