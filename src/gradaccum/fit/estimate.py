"""Peaks of a model that is not run: forward and backward on fake tensors, counted as if they were real."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from gradaccum.fit.borrowed_model import borrowed
from gradaccum.fit.probe import Probe
from gradaccum.fit.size_model import SizeModel
from gradaccum.fit.ways import Way, WorkCounter
from gradaccum.fit.workload import Workload
from gradaccum.memory.fakes import AsOnCuda, WithWorkspaces, fake_input, fake_mode, fake_of
from gradaccum.memory.live_bytes import LiveBytes

_ALONE = Way()
_CUDA_BLOCK_BYTES = 512
_OFF_THE_LINE = 0.01  # by how much a size in the middle may be, for the line to be taken as straight
_AS_EXPECTED = 0.001
_MOST_CORRECTIONS = 6


def block_bytes(device: torch.device) -> int:
    """What the device's allocator rounds every size up to."""
    return _CUDA_BLOCK_BYTES if device.type == "cuda" else 1


def is_cuda_elsewhere(device: torch.device, target: torch.device) -> bool:
    """Whether tensors of the CPU stand in for those of a CUDA device."""
    return target.type == "cuda" and device.type == "cpu"


def estimate(workload: Workload, found: SizeModel, *, target: torch.device, way: Way = _ALONE) -> None:
    """Adds to ``found`` the peaks of a few sizes, and of all where memory turns out not to be affine in the size.

    And the work of a sample, where there is a budget to be fitted into.

    Fake tensors are on the workload's device and stand for those of ``target``. Sizes about which the budget decides
    are run as well. What the model raises when it is shown tensors without data passes through.
    """
    device, mode = workload.device, fake_mode()
    stand_in = functools.partial(fake_of, mode=mode, device=device)
    own = functools.partial(fake_input, mode=mode, device=device)
    kernels = AsOnCuda() if is_cuda_elsewhere(device, target) else nullcontext()
    meter = LiveBytes(rounded_to=block_bytes(target))
    with (
        borrowed(workload.models, workload.optimizers, stand_in),
        mode,
        WithWorkspaces(),
        kernels,
        meter,
        way.held(workload, is_fake=True),
    ):
        probe = Probe(workload, target, found, own, meter)
        accumulated = probe.warm_up()
        _take_peaks(found, probe, accumulated)
        if found.memory is not None:
            _correct_the_largest(found, probe, found.memory)
            with WorkCounter() as work:
                probe.run(accumulated[0])
            found.work = work.count / accumulated[0]


def _take_peaks(found: SizeModel, probe: Probe, accumulated: Sequence[int]) -> None:
    # The second size as well: a single sample can be a special case (nothing to broadcast), off everybody else's line.
    last = max(found.rows, accumulated[-1])
    for size in dict.fromkeys((*accumulated[:2], last)):
        probe.take_peak(size)
    between = [size for size in accumulated if size not in found.peaks]
    if between:
        middle = min(between, key=lambda size: abs(size - last / 2))
        expected = found.curve().at(middle)
        probe.take_peak(middle)
        peak = found.peaks[middle]
        if abs(found.resident_bytes + peak - expected) > _OFF_THE_LINE * peak:
            for size in between:
                probe.take_peak(size)
    probe.take_peak(found.rows, is_whole=True)


def _correct_the_largest(found: SizeModel, probe: Probe, memory: int) -> None:
    """Runs the largest size that fits, as far as is known, and others near it, until a size takes what was expected."""
    for _ in range(_MOST_CORRECTIONS):
        curve = found.curve()
        size = curve.largest(memory, found.rows)
        if size is None or size == found.rows:
            return
        if size in found.peaks:  # between it and the next one there may be a bend, and more that fits
            size = (size + min(other for other in found.peaks if other > size)) // 2
            if size in found.peaks:
                return
        probe.take_peak(size)
        peak = found.peaks[size]
        if abs(found.resident_bytes + peak - curve.at(size)) <= _AS_EXPECTED * peak:
            return
