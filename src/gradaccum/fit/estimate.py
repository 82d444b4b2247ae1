"""Peaks of a model that is not run: forward and backward on fake tensors, counted as if they were real."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from gradaccum.fit.borrowed_model import borrowed
from gradaccum.fit.findings import Findings, first_that_runs, sizes_to_accumulate
from gradaccum.fit.probe import Probe, Task
from gradaccum.memory.cuda_kernels import AsOnCuda
from gradaccum.memory.fakes import WithWorkspaces, fake_micro_batch, fake_mode, fake_of
from gradaccum.memory.live_bytes import LiveBytes

_CUDA_BLOCK_BYTES = 512
_OFF_THE_LINE = 0.01  # by how much a size in the middle may be, for the line to be taken as straight
_AS_EXPECTED = 0.001
_MOST_CORRECTIONS = 6


def block_bytes(device: torch.device) -> int:
    """What the device's allocator rounds every size up to."""
    return _CUDA_BLOCK_BYTES if device.type == "cuda" else 1


def is_cuda_elsewhere(task: Task) -> bool:
    """Whether tensors of the CPU stand in for those of a CUDA device."""
    return task.target.type == "cuda" and task.device.type == "cpu"


def estimate(
    task: Task, sizes: Sequence[int], *, optimizers: Sequence[Optimizer], spare: int | None = None, step_bytes: int = 0
) -> Findings:
    """Runs a few sizes on fake tensors, and all of them where memory turns out not to be affine in the size.

    Args:
        task: with the device to estimate for.
        sizes: ascending, at most the batch's.
        optimizers: see `borrowed`.
        spare: bytes for all that `Findings` counts; sizes about which it decides are run as well.
        step_bytes: see `Findings`.

    Raises:
        Exception: whatever the model raises when it is shown tensors without data.
    """
    found = Findings(task.batch_size, list(sizes), step_bytes)
    mode = fake_mode()

    def micro_batch(size: int) -> Any:
        return fake_micro_batch(task.batch, size, mode=mode, device=task.device)

    stand_in = functools.partial(fake_of, mode=mode, device=task.device)
    kernels = AsOnCuda() if is_cuda_elsewhere(task) else nullcontext()
    meter = LiveBytes(rounded_to=block_bytes(task.target))
    with borrowed(task.models, optimizers, stand_in), mode, WithWorkspaces(), kernels, meter:
        probe = Probe(task, micro_batch=micro_batch, meter=meter)
        accumulated, note = first_that_runs(sizes_to_accumulate(sizes, task.batch_size), probe.warm_up)
        if note:
            found.without_a_single_sample(note)
        found.take_note_of(probe)
        _take_peaks(found, probe, accumulated)
        if spare is not None:
            _correct_the_largest(found, probe, spare)
    return found


def _take_peaks(found: Findings, probe: Probe, accumulated: Sequence[int]) -> None:
    # The second size as well: a single sample can be a special case (nothing to broadcast), off everybody else's line.
    last = max(found.batch_size, accumulated[-1])
    for size in dict.fromkeys((*accumulated[:2], last)):
        found.peaks[size] = probe.peak(size, is_whole=False)
    between = [size for size in accumulated if size not in found.peaks]
    if between:
        middle = min(between, key=lambda size: abs(size - last / 2))
        expected = found.curve().at(middle)
        found.peaks[middle] = probe.peak(middle, is_whole=False)
        if abs(found.peaks[middle] - expected) > _OFF_THE_LINE * found.peaks[middle]:
            for size in between:
                found.peaks[size] = probe.peak(size, is_whole=False)
    found.whole = probe.peak(found.batch_size, is_whole=True)


def _correct_the_largest(found: Findings, probe: Probe, spare: int) -> None:
    """Runs the largest size that fits, as far as is known, and others near it, until a size takes what was expected."""
    for _ in range(_MOST_CORRECTIONS):
        curve = found.curve()
        size = curve.largest(spare, found.batch_size)
        if size is None or size == found.batch_size:
            return
        if size in found.peaks:  # between it and the next one there may be a bend, and more that fits
            size = (size + min(other for other in found.peaks if other > size)) // 2
            if size in found.peaks:
                return
        found.peaks[size] = probe.peak(size, is_whole=False)
        if abs(found.peaks[size] - curve.at(size)) <= _AS_EXPECTED * found.peaks[size]:
            return
