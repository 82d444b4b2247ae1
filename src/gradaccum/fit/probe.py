"""One micro-batch, forward and backward, as an update runs it: what it takes at its peak, and how long.

The same code runs where something is measured and where it is estimated: only the tensors differ.

    accumulating    gradients of earlier micro-batches are there, and what backward adds to them comes on top
    in one piece    gradients come while activations go: the whole batch takes less than its size lets expect
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import tree
from gradaccum.fit.size_model import SizeModel
from gradaccum.fit.workload import Workload
from gradaccum.losses.terms import as_terms
from gradaccum.memory.live_bytes import Meter, num_bytes
from gradaccum.memory.out_of_memory import is_out_of_memory
from gradaccum.split.by_samples import cuts_anywhere
from gradaccum.types import num_rows

_MOST_REPEATS = 20
_SECONDS_PER_SIZE = 0.3


@dataclass(frozen=True, slots=True)
class Probe:
    """Runs micro-batches of a workload on whatever its borrowed modules hold at the moment."""

    workload: Workload
    target: torch.device  # that the tensors are taken to be on
    found: SizeModel  # to which peaks and times are added
    own: Callable[[Tensor], Tensor]  # from a tensor of the batch's rows to one in memory of its own
    meter: Meter  # is on since before the first run

    def warm_up(self) -> list[int]:
        """Runs once, for gradients and what is made only once; returns the sizes to accumulate with, at least two."""
        found = self.found
        sizes = sizes_to_accumulate(found.sizes, found.rows)
        sizes, note = first_that_runs(sizes, self.run)
        if note:
            found.notes.append(note)
            found.sizes = [size for size in found.sizes if size > 1] or found.sizes
        parameters = {id(p): p for model in self.workload.models for p in model.parameters()}.values()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        found.gradient_bytes = num_bytes(gradients)
        num_sparse = sum(gradient.is_sparse for gradient in gradients)
        if num_sparse:
            which = "A gradient is sparse and grows" if num_sparse == 1 else "Some gradients are sparse and grow"
            found.notes.append(f"{which} with each micro-batch until the update: peaks are those after a few.")
        return sizes

    def take_peak(self, size: int, *, is_whole: bool = False) -> None:
        """Runs a size; its peak counts inputs, and what there is beyond what was there before `warm_up`."""
        if is_whole:
            self._clear()
        before = self.meter.current
        run = self._prepared(size, is_whole=is_whole)
        inputs = self.meter.current - before
        self.meter.reset_peak()
        run()
        peak = self.meter.peak - inputs + self.workload.input_bytes(size, device=self.target)
        if is_whole:
            self.found.whole = peak
        else:
            self.found.peaks[size] = peak

    def run(self, size: int) -> None:
        """Runs a size, of which nothing is noted."""
        self._prepared(size, is_whole=False)()

    def take_times(self, size: int, *, is_whole: bool, at_most: float) -> None:
        """Times forward and backward: a few runs, or a single one that takes long."""
        run = self._prepared(size, is_whole=is_whole)
        repeats, total = 0, 0.0
        while not repeats or (repeats < _MOST_REPEATS and total < min(_SECONDS_PER_SIZE, at_most)):
            if is_whole:
                self._clear()
            _wait_for(self.workload.device)
            start = time.perf_counter()
            run()
            _wait_for(self.workload.device)
            seconds = time.perf_counter() - start
            self.found.times.add(size, seconds)
            repeats, total = repeats + 1, total + seconds

    def _prepared(self, size: int, *, is_whole: bool) -> Callable[[], None]:
        """What runs one micro-batch, whose inputs are there already."""
        workload = self.workload
        micro_batch = some_rows(workload, size, self.own)
        if workload.loss_fn is not None:
            loss_fn = workload.loss_fn
            return lambda: _backward(loss_fn(workload.model, micro_batch), samples=size)
        forward, batch_loss = workload.forward, workload.batch_loss
        assert forward is not None
        assert batch_loss is not None
        if is_whole:
            return lambda: _backward(batch_loss(forward(workload.model, micro_batch), micro_batch), samples=size)
        batch = some_rows(workload, workload.rows, self.own)

        def run_in_two_passes() -> None:
            """The whole batch's loss and the gradient on its outputs, then the micro-batch with its rows of that.

            Outputs of one micro-batch stand in for those of all others.
            """
            with torch.no_grad():
                outputs = forward(workload.model, micro_batch)
            outputs = tree.map_leaves(outputs, lambda leaf: _repeated(leaf, workload.rows))
            _backward(batch_loss(outputs, batch), samples=workload.rows)
            again = tree.tensors(forward(workload.model, micro_batch))
            pairs = [
                (output, of_whole.grad[:size])
                for output, of_whole in zip(again, tree.tensors(outputs), strict=True)
                if of_whole.grad is not None and output.requires_grad
            ]
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

        return run_in_two_passes

    def _clear(self) -> None:
        for model in self.workload.models:
            nn.Module.zero_grad(model)  # not one of its own


def some_rows(workload: Workload, size: int, own: Callable[[Tensor], Tensor]) -> Any:
    """As many rows of a batch as asked for; where it has fewer, they begin again.

    A split that keeps samples together says itself what it cuts for that size: its largest micro-batch.
    """
    batch, split, rows = workload.batch, workload.split, workload.rows
    if cuts_anywhere(split):
        taken = split.cut(batch, torch.arange(size) % rows if size > rows else slice(0, size))
    else:
        taken = split.cut(batch, max(split.plan(batch, split.largest(batch), max_rows=size), key=num_rows))
    return tree.map_leaves(taken, lambda leaf: own(leaf) if isinstance(leaf, Tensor) else leaf)


def sizes_to_accumulate(sizes: Sequence[int], rows: int) -> list[int]:
    """The sizes at which a batch is accumulated, at least two, so that they give a line."""
    found = [size for size in sizes if size < rows]
    for extra in (1, 2, 3):
        if len(found) < 2 and extra not in found:
            found.append(extra)
    return sorted(found)


def first_that_runs(sizes: Sequence[int], run: Callable[[int], None]) -> tuple[list[int], str | None]:
    """Runs the smallest size, or the next one where that is a single sample and fails; returns those left and a note.

    Some models cannot train on one sample (BatchNorm of a vector has no variance), which is no reason not to plan.
    """
    try:
        run(sizes[0])
    except Exception as error:
        if sizes[0] != 1 or is_out_of_memory(error):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
    else:
        return list(sizes), None
    left = [*sizes[1:], *([sizes[-1] + 1] if len(sizes) < 3 else [])]
    run(left[0])
    return left, f"A single sample cannot be run by itself: {reason}"


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
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
