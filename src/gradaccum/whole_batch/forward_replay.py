"""Running a forward a second time, as it was run the first time.

Apart from parameters and input a forward depends on random state (Python's and numpy's too: masks of speech models come
from numpy, layer drop from `random`) and on buffers. Both are noted before the first run and put back for the second;
afterwards they are where the first pass had left them, so that buffers advance once for each micro-batch.

That the second run gave what the first had given is not assumed but compared. What neither random state nor buffers
hold, a counter kept in an attribute, say, would otherwise give a gradient that belongs to no loss.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.errors import ReplayError
from gradaccum.window.snapshot import ALWAYS_COPIED, Buffers, ChangingBuffers, RandomState


def note_random_state() -> Callable[[], None]:
    """Notes the state of torch's, Python's and (where it is imported) numpy's generators; returns what restores it."""
    of_torch, of_python = RandomState.now(), random.getstate()
    numpy: Any = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        of_torch.restore()
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)

    return restore


class Replay:
    """Notes what micro-batches start from, and puts it back for their second run."""

    def __init__(self, models: Sequence[nn.Module], changing: ChangingBuffers) -> None:
        self._models, self._changing = models, changing
        self._first = changing.copied(models)
        self._unwritten = {id(place.buffer): place for place in self._first.places}
        self._restore_random = note_random_state()
        self._starts: dict[int, tuple[Callable[[], None], Buffers]] = {}

    def note(self, index: int) -> None:
        """Notes where the micro-batch of this index starts from."""
        self._starts[index] = note_random_state(), self._changed()

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Runs the micro-batch of this index from where it started; leaves random state and buffers as they are now."""
        restore_random, buffers = self._starts.pop(index)
        restore_present_random, here = note_random_state(), self._changed()
        self._first.restore(among=here)
        buffers.restore()
        restore_random()
        try:
            yield
        finally:
            here.restore()
            restore_present_random()

    def done(self) -> None:
        """Takes in which buffers the forwards have written to."""
        self._changing.seen(self._first)

    def undo(self) -> None:
        """Puts random state and buffers back to where the first micro-batch started."""
        self.done()
        self._first.restore()
        self._restore_random()
        self._starts.clear()

    def _changed(self) -> Buffers:
        """Copies of the buffers that may be others than at the start: small ones, and large ones that were written."""
        return Buffers.of(self._models, only=self._may_have_changed)

    def _may_have_changed(self, buffer: Tensor) -> bool:
        place = self._unwritten.get(id(buffer))
        return buffer.numel() <= ALWAYS_COPIED or place is None or place.was_written


class Drift:
    """How far second runs were from first ones; looked at once a window, so that nothing waits for the device."""

    def __init__(self) -> None:
        self._furthest: dict[torch.dtype, Tensor] = {}

    def compare(self, again: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Takes a micro-batch's outputs of both runs in.

        Raises:
            ReplayError: they differ in number, shape or dtype.
        """
        second = [(tuple(tensor.shape), tensor.dtype) for tensor in again]
        first = [(tuple(tensor.shape), tensor.dtype) for tensor in before]
        if first != second:
            raise ReplayError(
                f"The second forward of a micro-batch returned {_shown(second)}, the first {_shown(first)}. Its "
                "gradient would belong to other outputs than the loss has seen. Does forward switch autocast by "
                "something that changes between two calls, or depend on a state of its own?"
            )
        for one, other in zip(again, before, strict=True):
            if one.numel() and one.is_floating_point():
                scale = other.abs().amax().clamp_min(torch.finfo(other.dtype).tiny)
                # NaN in the same places is no difference: what is not finite is found at the update.
                apart = torch.where(one == other, 0.0, (one.detach() - other).abs()).nan_to_num(nan=0.0).amax() / scale
                worst = self._furthest.get(one.dtype)
                self._furthest[one.dtype] = apart if worst is None else torch.maximum(worst, apart.to(worst.device))

    def check(self) -> None:
        """That no run differed by more than rounding.

        Nondeterministic kernels round differently in each run. ``eps ** (2 / 3)`` (4e-11 in fp64, 2e-5 in fp32, 4e-2 in
        bf16) is far above that, and below what another dropout mask or another precision makes.

        Raises:
            ReplayError: one did.
        """
        for dtype, tensor in self._furthest.items():
            apart = tensor.item()  # the one wait for the device, and only where something ran twice
            if apart > torch.finfo(dtype).eps ** (2 / 3):
                raise ReplayError(
                    f"The second forward of a micro-batch gave outputs that differ from the first by {apart:.2g} of "
                    "their size. The gradient would belong to other outputs than the loss has seen, so no update was "
                    "made. Random state (torch's, numpy's and Python's) and buffers had been put back, so forward "
                    "depends on something else that changed: a counter or a cache in an attribute (make it a buffer), "
                    "an input that it changes in place (write x = x / 255, not x.div_(255)), "
                    "a torch.Generator of its own (draw from the default one), or kernels that are not deterministic "
                    "(torch.use_deterministic_algorithms(True)). With kept_graphs=None nothing runs twice as long as "
                    "it fits."
                )


def _shown(described: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in described) or "no tensor"
