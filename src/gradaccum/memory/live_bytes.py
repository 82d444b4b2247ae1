"""How many bytes of tensors are alive: counted op by op, or asked of the allocator where there is one that counts.

`LiveBytes` sees every operation below autograd and keeps a weak reference to each storage that an operation allocates.
Storages, not tensors: views share theirs, and autograd's saved tensors, which Python never sees, hold on to theirs.
torch keeps the Python object of a storage alive as long as the storage itself, so a weak reference to it ends when the
memory is given back, in whatever thread that is. Fake tensors have storages with a size and no memory: counted alike.

What is counted is what was allocated between two operations. Not counted: what an operation allocates and frees inside
itself (a convolution's workspace), rounding and fragmentation by the allocator, memory that is not torch's (numpy's,
NCCL's), and what was there before. Code that torch.compile compiled allocates unseen, so it runs eagerly meanwhile.

On CUDA `measured_peak` asks the caching allocator instead, which sees all of torch's memory and costs nothing. Counting
costs about 10 us an operation: never count and measure time in one run.

The idea is that of torch.distributed._tools.mem_tracker, which needs hooks on modules and optimizers besides.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class Meter(Protocol):
    """Tells how much memory has been taken since it was put up; a peak stays readable when the meter is gone."""

    @property
    def current(self) -> int:
        """Bytes taken now, beyond what was taken at the start; less than 0 where more was given back."""
        ...

    @property
    def peak(self) -> int:
        """The largest that `current` has been since the start, or since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Has `peak` start over from `current`."""
        ...


@contextmanager
def measured_peak(device: torch.device) -> Iterator[Meter]:
    """Measures the memory that torch's tensors on a device take while held.

    CUDA counts by its allocator, whose peak statistics are reset; every other device op by op, which sees the tensors
    of all devices.

    Example:
        >>> with measured_peak(torch.device("cpu")) as memory:
        ...     x = torch.zeros(1000)
        ...     y = x + x
        ...     del y
        >>> memory.peak
        8000
    """
    meter = AllocatorBytes(device) if device.type == "cuda" else LiveBytes()
    with meter:
        yield meter


class AllocatorBytes:
    """The caching allocator's own count of a CUDA device; see `Meter`.

    Blocks that are kept for later are not in it. The allocator counts when memory is asked for, not when the device
    uses it, so nothing has to be waited for.
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
        """See `Meter`."""
        return self._final[0] if self._final else torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        """See `Meter`."""
        return self._final[1] if self._final else torch.cuda.max_memory_allocated(self._device) - self._before

    def reset_peak(self) -> None:
        """See `Meter`."""
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(slots=True, eq=False)
class _Allocation:
    """A storage that has grown while it was watched."""

    reference: weakref.ref[UntypedStorage]
    bytes_before: int  # what it had when first seen: 0 for one that an operation has made
    bytes: int = 0  # what is counted for it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate while it is on; see `Meter`.

    It follows the backward into the engine's threads. Storages that die after it is off are no longer counted off.

    Args:
        rounded_to: what a size is rounded up to, as an allocator would: 512 on CUDA.

    Example:
        >>> with LiveBytes() as memory:
        ...     x = torch.ones(10, requires_grad=True)
        ...     y = x.exp()                     # saved for backward
        ...     loss = y.sum()
        >>> memory.current
        84
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
        self._held = ExitStack()

    @property
    def current(self) -> int:
        """See `Meter`."""
        with self._lock:
            self._forget_freed()
            return self._current

    @property
    def peak(self) -> int:
        """See `Meter`."""
        return self._peak

    def reset_peak(self) -> None:
        """See `Meter`."""
        self._peak = self.current

    def __enter__(self) -> LiveBytes:
        with ExitStack() as held:
            held.enter_context(_resizes_seen(self._resized))
            if "torch._dynamo" in sys.modules:  # something may be compiled; importing it for nothing takes a second
                held.enter_context(torch.compiler.set_stance("force_eager"))
            super().__enter__()
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._held.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and looks at what it has allocated."""
        kwargs = kwargs or {}
        given = {id(storage): storage for storage in _storages((args, kwargs))}
        sizes = {key: storage.nbytes() for key, storage in given.items()}
        result = func(*args, **kwargs)
        changed = [(storage, sizes[key]) for key, storage in given.items() if storage.nbytes() != sizes[key]]
        if func is torch.ops.aten.lift_fresh.default:
            given = {}  # the new tensor of torch.tensor([...]), which no operation has returned before
        made = [(storage, 0) for storage in _storages(result) if id(storage) not in given]
        if made or changed:
            self._count([*made, *changed])
        return result

    def _resized(self, storage: UntypedStorage, bytes_before: int) -> None:
        self._count([(storage, bytes_before)])

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
        note = functools.partial(_leave_note, self._freed, id(storage))
        allocation = self._allocations[id(storage)] = _Allocation(weakref.ref(storage, note), bytes_before)
        return allocation

    def _forget_freed(self) -> None:
        while self._freed:
            self._current -= self._allocations.pop(self._freed.popleft()).bytes

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._rounded_to) * self._rounded_to


def _leave_note(freed: deque[int], key: int, _: object) -> None:
    freed.append(key)  # a bound method would keep the counter alive for as long as any storage


def storages_of(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The memory of a tensor: one storage, several for sparse tensors and wrappers, none for opaque ones."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from _storages((tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from _storages((tensor.ccol_indices(), tensor.row_indices(), tensor.values()))


def _storages(values: Any) -> Iterator[UntypedStorage]:
    """The storages of all tensors among the arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield from storages_of(values)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _storages(value)


@contextmanager
def _resizes_seen(resized: Callable[[UntypedStorage, int], None]) -> Iterator[None]:
    """Tells of every ``storage.resize_(n)``, with what the storage had before: no operation is dispatched for it.

    The method is shadowed on torch's class, since it cannot be on one storage: a method of C has no other place.
    """
    shadowed = vars(UntypedStorage).get("resize_")
    original = UntypedStorage.resize_

    @functools.wraps(original)
    def resize_(storage: UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        result = original(storage, size)
        resized(storage, before)
        return result

    UntypedStorage.resize_ = resize_  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if shadowed is None:
            del UntypedStorage.resize_
        else:
            UntypedStorage.resize_ = shadowed
