"""Peaks and times of real micro-batches on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from gradaccum.fit.borrowed_model import SavedBeforeWriting, borrowed, sharing_memory
from gradaccum.fit.probe import Probe, sizes_to_accumulate
from gradaccum.fit.size_model import SizeModel
from gradaccum.fit.ways import Way
from gradaccum.fit.workload import Workload
from gradaccum.memory.live_bytes import measured_peak
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of

_ALONE = Way()
_FOR_PEAKS = 0.6  # of the time, at most: the rest is for timing


def measure(workload: Workload, found: SizeModel, *, max_seconds: float, way: Way = _ALONE) -> None:
    """Adds to ``found`` what its sizes take, the smallest first, as long as they should fit and time is left."""
    run = _Measurement(workload=workload, found=found, max_seconds=max_seconds, way=way)
    saved = SavedBeforeWriting([t for model in workload.models for t in [*model.parameters(), *model.buffers()]])

    def own(tensor: Tensor) -> Tensor:  # a loss function may write its micro-batch
        return tensor.detach().to(workload.device, copy=True).requires_grad_(tensor.requires_grad)

    with borrowed(workload.models, workload.optimizers, sharing_memory), way.held(workload):
        with measured_peak(workload.device) as meter:
            probe = Probe(workload, workload.device, found, own, meter)
            with saved:
                run.take_peaks(probe)
        with saved if saved.has_saved else nullcontext():
            run.take_times(probe)
    free_memory(workload.device)


@dataclass(slots=True, kw_only=True)
class _Measurement:
    workload: Workload
    found: SizeModel
    max_seconds: float
    way: Way
    start: float = field(default_factory=time.perf_counter)
    last: tuple[int, float] = (1, 0.0)  # the size that was run last, and its seconds

    def take_peaks(self, probe: Probe) -> None:
        """Runs one size after another until one does not fit, or is not expected to, or time is up."""
        found = self.found
        accumulated: list[int] = []
        if not self._fits(sizes_to_accumulate(found.sizes, found.rows)[0], lambda: accumulated.extend(probe.warm_up())):
            return
        if all(self._try(probe, size) for size in accumulated) and found.rows in found.sizes:
            self._try(probe, found.rows, is_whole=True)
        if found.looks_between and found.memory is not None and len(found.peaks) > 1 and not found.failed:
            between = found.curve().largest(found.memory, found.rows)
            if between is not None and between not in (*found.sizes, *found.peaks) and self._try(probe, between):
                found.sizes.append(between)

    def take_times(self, probe: Probe) -> None:
        """Times the sizes that have been run and fit, small ones first; of other ways, which have less time, last."""
        found = self.found
        for size in sorted(found.sizes, reverse=self.way != _ALONE):
            is_whole = size == found.rows
            peak = found.whole if is_whole else found.peaks.get(size)
            if peak is None or (found.memory is not None and found.resident_bytes + peak > found.memory):
                continue
            left = self.max_seconds - self._elapsed()
            if left <= 0 and found.times.of_size:
                self._note_the_time(f"from {size} on sizes were not timed")
                return
            probe.take_times(size, is_whole=is_whole, at_most=left)

    def _try(self, probe: Probe, size: int, *, is_whole: bool = False) -> bool:
        """Runs a size that is expected to fit, and in time, and tells whether it did. The first two are always run."""
        found, start = self.found, self._elapsed()
        if len(found.peaks) > 1:
            expected = found.curve().at(size) - (found.gradient_bytes if is_whole else 0)
            if found.memory is not None and expected > found.memory:
                return False
            last_size, seconds = self.last
            if start + seconds * size / last_size > _FOR_PEAKS * self.max_seconds:
                self._note_the_time(f"from {size} on sizes were not run, and their peaks are predicted")
                return False
        fits = self._fits(size, lambda: probe.take_peak(size, is_whole=is_whole))
        if fits:
            self.last = (size, self._elapsed() - start)
            found.ran.add(size)
        return fits

    def _fits(self, size: int, run: Callable[[], None]) -> bool:
        """Runs a size, and takes note of it where memory runs out."""
        try:
            run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        else:
            return True
        # Outside of the handler, which would keep the tensors of the failed run alive.
        let_go_of(failure)
        free_memory(self.workload.device)
        self.found.failed.add(size)
        return False

    def _note_the_time(self, what: str) -> None:
        self.found.notes.append(f"Within {self.max_seconds:g} s (max_seconds), {what}.")

    def _elapsed(self) -> float:
        return time.perf_counter() - self.start
