"""One micro-batch, forward and backward, as an update runs it: what it takes at its peak, and how long.

The same code runs where something is measured and where it is estimated: only the tensors differ.

    accumulating    gradients of earlier micro-batches are there, and what backward adds to them comes on top
    in one piece    gradients come while activations go: the whole batch takes less than its size lets expect
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.losses.terms import as_terms
from gradaccum.memory.live_bytes import Meter, storages_of

_MOST_REPEATS = 20
_SECONDS_PER_SIZE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be planned.

    Attributes:
        models: all modules.
        model: what the user's functions are called with: a module, or a sequence of them.
        loss_fn: ``loss_fn(model, micro_batch)``; None where there is a ``batch_loss``.
        forward: ``forward(model, micro_batch)``, for a loss over the whole batch's outputs.
        batch_loss: ``batch_loss(outputs, batch)``.
        batch: at least one row, where the user keeps it.
        batch_size: its rows.
        device: where the tensors are that run.
        target: where they are taken to be.
    """

    models: Sequence[nn.Module]
    model: Any
    loss_fn: Callable[[Any, Any], Any] | None
    forward: Callable[[Any, Any], Any] | None
    batch_loss: Callable[[Any, Any], Any] | None
    batch: Any
    batch_size: int
    device: torch.device
    target: torch.device

    def input_bytes(self, size: int) -> int:
        """What is on the device of the batch itself while a micro-batch runs.

        A batch that is there already stays. From elsewhere comes the micro-batch, on CUDA with the next one on its way;
        and the whole batch, where its loss is taken at once.
        """
        is_split = size < self.batch_size
        here = sum(tensor.nbytes for tensor in tree.tensors(self.batch) if tensor.device == self.target)
        elsewhere = sum(tensor.nbytes for tensor in tree.tensors(self.batch) if tensor.device != self.target)
        pieces = size * (2 if self.target.type == "cuda" and is_split else 1)
        if self.loss_fn is None and is_split:
            pieces += self.batch_size
        return here + elsewhere * pieces // self.batch_size


class Probe:
    """Runs micro-batches of a task on whatever its modules hold at the moment.

    Args:
        task: its modules are borrowed.
        micro_batch: makes the micro-batch of a number of rows, in memory of its own.
        meter: is on, and was put up before the first run.

    Attributes:
        gradient_bytes: of all gradients, after `warm_up`.
        num_sparse: how many of them are sparse.
    """

    def __init__(self, task: Task, *, micro_batch: Callable[[int], Any], meter: Meter) -> None:
        self._task = task
        self._micro_batch = micro_batch
        self._meter = meter
        self.gradient_bytes = 0
        self.num_sparse = 0

    def warm_up(self, size: int) -> None:
        """The first run, which leaves gradients, and whatever modules and libraries make only once."""
        self._clear()
        self._prepared(size, is_whole=False)()
        self.gradient_bytes = num_bytes(self._gradients())
        self.num_sparse = sum(gradient.is_sparse for gradient in self._gradients())

    def peak(self, size: int, *, is_whole: bool) -> int:
        """Bytes at their peak, inputs included, beyond what was there before `warm_up`."""
        if is_whole:
            self._clear()
        before = self._meter.current
        run = self._prepared(size, is_whole=is_whole)
        inputs = self._meter.current - before
        self._meter.reset_peak()
        run()
        return self._meter.peak - inputs + self._task.input_bytes(size)

    def seconds(self, size: int, *, is_whole: bool, at_most: float) -> float:
        """Median wall time of forward and backward: of a few runs, or of a single one that takes long."""
        run = self._prepared(size, is_whole=is_whole)
        times: list[float] = []
        while not times or (len(times) < _MOST_REPEATS and sum(times) < min(_SECONDS_PER_SIZE, at_most)):
            if is_whole:
                self._clear()
            _wait_for(self._task.device)
            start = time.perf_counter()
            run()
            _wait_for(self._task.device)
            times.append(time.perf_counter() - start)
        return median(times)

    def _prepared(self, size: int, *, is_whole: bool) -> Callable[[], None]:
        """What runs one micro-batch, whose inputs are there already."""
        task = self._task
        micro_batch = self._micro_batch(size)
        if task.loss_fn is not None:
            loss_fn = task.loss_fn
            return lambda: _backward(loss_fn(task.model, micro_batch), samples=size)
        assert task.forward is not None
        assert task.batch_loss is not None
        forward, batch_loss = task.forward, task.batch_loss
        if is_whole:
            return lambda: _backward(batch_loss(forward(task.model, micro_batch), micro_batch), samples=size)
        batch = self._micro_batch(task.batch_size)
        return lambda: self._run_in_two_passes(micro_batch, batch, size)

    def _run_in_two_passes(self, micro_batch: Any, batch: Any, size: int) -> None:
        """Outputs of the whole batch, its loss and the gradient on them; then the micro-batch with its share of that.

        Outputs of one micro-batch stand in for those of all others.
        """
        task = self._task
        assert task.forward is not None
        assert task.batch_loss is not None
        with torch.no_grad():
            outputs = task.forward(task.model, micro_batch)
        outputs = tree.map_leaves(outputs, lambda leaf: _repeated(leaf, task.batch_size))
        _backward(task.batch_loss(outputs, batch), samples=task.batch_size)
        gradients = [tensor.grad for tensor in tree.tensors(outputs)]
        again = tree.tensors(task.forward(task.model, micro_batch))
        pairs = [
            (output, gradient[:size])
            for output, gradient in zip(again, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def _parameters(self) -> Iterable[nn.Parameter]:
        return {id(p): p for model in self._task.models for p in model.parameters()}.values()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]

    def _clear(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of tensors; what they share counts once."""
    storages = {id(storage): storage for tensor in tensors for storage in storages_of(tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def _backward(loss: Any, *, samples: int) -> None:
    roots = [term.root for term in as_terms(loss, samples).values() if term.root.requires_grad]
    if roots:  # a term that weighs nothing may have no graph
        torch.autograd.backward(roots)


def _repeated(leaf: Any, rows: int) -> Any:
    """A whole batch's outputs, with as many rows, made of those of one micro-batch."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    repeated = leaf.index_select(0, torch.arange(rows, device=leaf.device) % leaf.shape[0])
    return repeated.requires_grad_() if repeated.is_floating_point() or repeated.is_complex() else repeated


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)
