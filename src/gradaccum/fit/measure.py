"""Peaks and times of real micro-batches on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradaccum import tree
from gradaccum.fit.borrowed_model import SavedBeforeWriting, borrowed, sharing_memory
from gradaccum.fit.findings import Findings, first_that_runs, sizes_to_accumulate
from gradaccum.fit.probe import Probe, Task
from gradaccum.memory.live_bytes import measured_peak
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of

_FOR_PEAKS = 0.6  # of the time, at most: the rest is for timing


def measure(
    task: Task,
    sizes: Sequence[int],
    *,
    optimizers: Sequence[Optimizer],
    spare: int | None,
    step_bytes: int,
    max_seconds: float,
    looks_between: bool,
) -> Findings:
    """Runs sizes from the smallest on, as long as they can be expected to fit and time is left.

    Args:
        task: on the device of its models.
        sizes: ascending, at most the batch's.
        optimizers: see `borrowed`.
        spare: bytes for all that `Findings` counts; None where there is no limit but the device's own.
        step_bytes: see `Findings`.
        max_seconds: in all, about.
        looks_between: whether the largest size that fits is added to ``sizes``.
    """
    run = _Measurement(task, Findings(task.batch_size, list(sizes), step_bytes), spare=spare, max_seconds=max_seconds)
    saved = SavedBeforeWriting([t for model in task.models for t in [*model.parameters(), *model.buffers()]])
    with borrowed(task.models, optimizers, sharing_memory):
        with measured_peak(task.device) as meter:
            probe = Probe(task, micro_batch=run.micro_batch, meter=meter)
            with saved:
                run.take_peaks(probe, looks_between=looks_between)
        with saved if saved.has_saved else nullcontext():
            run.take_times(probe)
    free_memory(task.device)
    return run.found


class _Measurement:
    """One measurement while it goes on."""

    def __init__(self, task: Task, found: Findings, *, spare: int | None, max_seconds: float) -> None:
        self.found = found
        self._task = task
        self._spare = spare
        self._start = time.perf_counter()
        self._max_seconds = max_seconds
        self._last = (1, 0.0)

    def micro_batch(self, size: int) -> Any:
        """Rows of the batch in memory of their own: a loss function may write them. They begin again at its end."""
        rows = self._task.batch_size
        piece = tree.take(self._task.batch, torch.arange(size) % rows if size > rows else slice(0, size))

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            copied = leaf.detach().to(self._task.device, copy=True)
            return copied.requires_grad_(leaf.requires_grad)

        return tree.map_leaves(piece, own)

    def take_peaks(self, probe: Probe, *, looks_between: bool) -> None:
        """Runs one size after another until one does not fit, or is not expected to, or time is up."""
        found, task = self.found, self._task
        accumulated = self._warmed_up(probe)
        if accumulated is None:
            return
        found.take_note_of(probe)
        whole = [task.batch_size] if task.batch_size in found.sizes else []
        for size, is_whole in [*((size, False) for size in accumulated), *((size, True) for size in whole)]:
            if not self._can_be_tried(size, is_whole=is_whole) or not self._tried(probe, size, is_whole=is_whole):
                break
        if looks_between and self._spare is not None and len(found.peaks) > 1 and not found.failed:
            between = found.curve().largest(self._spare, task.batch_size)
            if between is not None and between not in (*found.sizes, *found.peaks):
                is_new = self._can_be_tried(between, is_whole=False) and self._tried(probe, between, is_whole=False)
                found.sizes += [between] if is_new else []

    def take_times(self, probe: Probe) -> None:
        """Times the sizes that have been run and fit, small ones first."""
        found, task = self.found, self._task
        for size in sorted(found.sizes):
            is_whole = size == task.batch_size
            peak = found.whole if is_whole else found.peaks.get(size)
            if peak is None or (self._spare is not None and peak > self._spare):
                continue
            left = self._max_seconds - self._elapsed()
            if left <= 0 and found.seconds:
                self._note_the_time(f"from {size} on sizes were not timed")
                return
            found.seconds[size] = probe.seconds(size, is_whole=is_whole, at_most=left)

    def _warmed_up(self, probe: Probe) -> list[int] | None:
        """The sizes at which to accumulate; None where not even the smallest fits."""
        sizes = sizes_to_accumulate(self.found.sizes, self._task.batch_size)
        try:
            sizes, note = first_that_runs(sizes, probe.warm_up)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        else:
            if note:
                self.found.without_a_single_sample(note)
            return sizes
        self._failed(sizes[0], failure)
        return None

    def _can_be_tried(self, size: int, *, is_whole: bool) -> bool:
        """Whether a size is expected to fit, and to be done in time. The first two are always tried."""
        found = self.found
        if len(found.peaks) < 2:
            return True
        expected = found.curve().at(size) - (found.gradient_bytes if is_whole else 0)
        if self._spare is not None and expected > self._spare:
            return False
        last_size, seconds = self._last
        if self._elapsed() + seconds * size / last_size > _FOR_PEAKS * self._max_seconds:
            self._note_the_time(f"from {size} on sizes were not run, and their peaks are predicted")
            return False
        return True

    def _tried(self, probe: Probe, size: int, *, is_whole: bool) -> bool:
        """Whether the size ran."""
        start = self._elapsed()
        try:
            peak = probe.peak(size, is_whole=is_whole)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        else:
            self._last = (size, self._elapsed() - start)
            self.found.ran.add(size)
            if is_whole:
                self.found.whole = peak
            else:
                self.found.peaks[size] = peak
            return True
        self._failed(size, failure)
        return False

    def _failed(self, size: int, failure: Exception) -> None:
        """To be called outside of the handler, which would keep the tensors of the failed run alive."""
        let_go_of(failure)
        free_memory(self._task.device)
        self.found.failed.add(size)

    def _note_the_time(self, what: str) -> None:
        self.found.notes.append(f"Within {self._max_seconds:g} s (max_seconds), {what}.")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start
