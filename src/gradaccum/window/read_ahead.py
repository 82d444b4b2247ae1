"""Whether a loader may be asked for the next item before this one has been used.

A pass looks one item ahead, so that it knows the last one. Two kinds of loader do not stand that: one that fills the
memory of an item again with the next, and one that computes its items with the model in training, which is another
model after the update that lies between. Both do so from the first items on, so those alone are looked at: the memory
of the items that wait, before and after the next one is read, and which tensors the reading itself computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum import tree
from gradaccum.errors import MisuseError

_MAX_LOOKS = 8
_MAX_ELEMENTS = 4096


class ReadAhead:
    """Reads the items of one pass, and looks at what the first readings do."""

    def __init__(self, items: Any) -> None:
        self._own: frozenset[int] | None = None
        self._looks = 0 if isinstance(items, (list, tuple)) else _MAX_LOOKS  # theirs lie there before

    def next(self, iterator: Any, waiting: Sequence[Any], parameters: Callable[[], Iterable[Tensor]]) -> Any:
        """The iterator's next item.

        Args:
            iterator: of the loader.
            waiting: the items that have been read before and are not used yet.
            parameters: what is in training.

        Raises:
            StopIteration: there is none.
            MisuseError: the loader cannot be read ahead.
        """
        if not self._looks or not waiting:
            return next(iterator)
        self._looks -= 1
        before = [(tensor, tensor._version, _sample(tensor)) for item in waiting for tensor in _memory(item)]
        if self._own is None:
            self._own = frozenset(filter(None, map(_storage, parameters())))
        with _Computing(self._own) as computing:
            item = next(iterator)
        if computing.uses_model:
            raise MisuseError(
                "The loader computes its items with the parameters in training, and over() reads one item ahead, "
                "before the update of the item at hand: each would come from the weights before that update. Have the "
                "loader yield what the items are computed from, and compute them in the loop: for prompts in "
                "accumulator.over(loader): batch = make(model, prompts)."
            )
        if any(_has_changed(tensor, version, sample) for tensor, version, sample in before):
            raise MisuseError(
                "The loader fills the memory of one micro-batch again with the next, and over() reads one item ahead, "
                "before this one is used: it would be trained on twice, and the first one never. Have the loader yield "
                "a copy, buffer.clone() or array.copy(), or fill two buffers in turn."
            )
        return item


class _Computing(TorchDispatchMode):
    """Sees whether anything is computed, in this thread, from the memory of some parameters."""

    def __init__(self, own: frozenset[int]) -> None:
        super().__init__()
        self._own = own
        self.uses_model = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.uses_model:
            self.uses_model = any(
                isinstance(one, Tensor) and _storage(one) in self._own
                for argument in args
                for one in (argument if isinstance(argument, (list, tuple)) else (argument,))
            )
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """Where the tensor's memory begins; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _memory(item: Any) -> list[Tensor]:
    """The item's tensors, and its NumPy arrays as tensors of the same memory."""
    found: list[Tensor] = []
    for leaf in tree.leaves(item):
        if type(leaf) is Tensor and leaf.layout is torch.strided and leaf.device.type != "meta":
            found.append(leaf)
        elif hasattr(leaf, "__array_interface__") and getattr(leaf, "shape", ()):
            try:
                found.append(torch.as_tensor(leaf))
            except (TypeError, ValueError, RuntimeError):
                continue  # of words, or a layout that torch does not have
    return found


def _sample(tensor: Tensor) -> Tensor:
    """Some of the tensor's bytes, as a copy. NaN is equal to itself in bytes."""
    with torch.no_grad():
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()[:1].reshape(-1)
        some = flat[:: max(1, -(-flat.numel() // _MAX_ELEMENTS))]
        return (torch.view_as_real(some.resolve_conj()) if some.is_complex() else some).clone(
            memory_format=torch.contiguous_format
        )


def _has_changed(tensor: Tensor, version: int, sample: Tensor) -> bool:
    # On a device only a change that torch has seen is worth waiting for. NumPy shares the host's memory alone.
    if tensor.device.type != "cpu" and tensor._version == version:
        return False
    now = _sample(tensor)
    return now.shape != sample.shape or not torch.equal(now.view(torch.uint8), sample.view(torch.uint8))
