"""`plan`: what an update of a batch takes at each micro-batch size, and which size to take."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradaccum.errors import UnsupportedError, WindowError
from gradaccum.fit.estimate import block_bytes, estimate, is_cuda_elsewhere
from gradaccum.fit.measure import measure
from gradaccum.fit.plan_result import Breakdown, Plan, Row
from gradaccum.fit.size_model import SizeModel, in_words
from gradaccum.fit.ways import FittingWay, Way, explored, ways_besides
from gradaccum.fit.workload import Workload
from gradaccum.memory.available import available_bytes
from gradaccum.memory.fakes import can_be_faked
from gradaccum.memory.live_bytes import num_bytes
from gradaccum.memory.optimizer_memory import optimizer_memory, tensors_of
from gradaccum.types import Split
from gradaccum.window.option_names import explains_arguments

logger = logging.getLogger(__name__)

MEASURE, ESTIMATE = "measure", "estimate"
_ALONE = Way()
_MOST_SIZES = 12
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_PREFIXES = {
    f"{letter}{i}": base**power for i, base in (("", 1000), ("i", 1024)) for power, letter in enumerate("kmgt", 1)
}
_UNITS = {"b": 1} | {f"{prefix}b": size for prefix, size in _PREFIXES.items()}


@explains_arguments("A batch is one argument: (x, y).")
def plan(
    model: nn.Module | Sequence[nn.Module],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    memory: str | int | None = None,
    method: str = MEASURE,
    micro_batch_sizes: Sequence[int] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    batch_loss: Callable[[Any, Any], Any] | None = None,
    split: Split | None = None,
    device: str | torch.device | None = None,
    dataset_size: int | None = None,
    max_seconds: float = 60.0,
) -> Plan:
    """Finds out what fits into memory, and what is fastest.

    Where the batch does not fit in one piece, micro-batches are planned with chunks of the head, with recomputed blocks
    and with activations on the host as well, as far as the model has such, and ``plan.ways`` has those that fit.

    The peak of an update is a fixed part (parameters, gradients, optimizer state) and what a micro-batch of n samples
    adds, which is affine in n: a few sizes give the rest. Model, buffers, optimizer, gradients and random state are
    left as they were.

    Args:
        model: one module or a sequence of them, in the mode they train in.
        loss_fn: ``loss_fn(model, micro_batch)``, as for `TrainStep`.
        batch: a whole batch, of samples as large as they come: padded to the longest.
        optimizer: one or a sequence of them, whose state counts too, before and after the first update.
        memory: the budget: "24GiB", "24GB" or a number of bytes. By default what the device has left; nothing for
            estimates. Tensors are what counts: a CUDA context (about half a GiB) comes on top.
        method: "measure" runs micro-batches on the device of the model; "estimate" needs none, counts the memory of
            tensors without data, and has no times. A forward that needs data (lengths, masks) is measured anyway.
        micro_batch_sizes: those to look at; powers of two and the whole batch by default.
        forward: ``forward(model, micro_batch)``, in place of ``loss_fn``, where the loss is over the whole batch.
        batch_loss: ``batch_loss(outputs, batch)``.
        split: how the batch is cut, as for `TrainStep`.
        device: for estimates, the device to estimate for, such as "cuda" on a machine that has none; by default the
            model's own, and "cuda" for a model on the meta device.
        dataset_size: samples of an epoch, to tell its updates.
        max_seconds: about how long to measure; half of it goes to other ways than micro-batches, where there are some.

    Raises:
        WindowError: a size or an option that is none.
        BatchError: rows disagree, or there are none.
        UnsupportedError: it can neither be measured nor estimated here.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> def loss_fn(model, micro_batch):
        ...     x, y = micro_batch
        ...     return F.mse_loss(model(x), y)
        >>> batch = torch.randn(64, 8), torch.randn(64, 1)
        >>> plan = ga.plan(model, loss_fn, batch, memory="16KiB", method="estimate")
        >>> plan.micro_batch_size, plan.peak_bytes(64) > plan.memory >= plan.peak_bytes(plan.micro_batch_size)
        (29, True)
    """
    if method not in (MEASURE, ESTIMATE):
        raise WindowError(
            f"method={method!r} is not known. 'measure' runs micro-batches on the device at hand, 'estimate' counts "
            "without one."
        )
    if not max_seconds > 0:
        raise WindowError(f"max_seconds={max_seconds!r} leaves no time to measure in. Pass a number above 0.")
    workload = Workload.checked(
        model, loss_fn, batch, forward=forward, batch_loss=batch_loss, optimizer=optimizer, split=split
    )
    sizes, looks_between = _checked_sizes(micro_batch_sizes, workload.rows), micro_batch_sizes is None
    budget = None if memory is None else as_bytes(memory)
    wanted = None if device is None else _as_device(device)
    if method == MEASURE and wanted is not None and wanted.type != workload.device.type:
        raise WindowError(
            f"method='measure' runs on the model's own device, {workload.device}, and device={str(device)!r} was asked "
            "for. Move the model there, or pass method='estimate' (--estimate on the command line), which needs no "
            "device."
        )
    notes: list[str] = []
    if not workload.optimizers:
        notes.append("No optimizer was passed, so its state is not counted: Adam's is twice the parameters.")
    if not any(module.training for model in workload.models for module in model.modules()):
        notes.append("The model is in eval mode, in which some layers keep less for backward: model.train().")
    failure: Exception | None = None
    if method == ESTIMATE:
        elsewhere, target, note = _elsewhere(workload, wanted)
        try:
            found = _size_model(elsewhere, target, sizes, memory=budget, looks_between=looks_between)
            estimate(elsewhere, found, target=target)

            def estimate_way(sizes: SizeModel, way: Way) -> None:
                estimate(elsewhere, sizes, target=target, way=way)

            ways, of_ways = _ways(elsewhere, found, target, estimate_way)
            return _assembled(found, target, method, [*notes, *note, *of_ways], dataset_size, ways)
        except Exception as error:  # noqa: BLE001  # anything may come of tensors without data; a real mistake comes again
            failure, reason = error, (str(error) or repr(error)).splitlines()[0]
        logger.info("no estimate is possible, measuring instead: %s", reason)
        notes.append(f"Measured on {workload.device}, since the forward needs tensors with data: {reason}")
    if workload.device.type == "meta":
        raise UnsupportedError(
            "The model is on the meta device, which has no memory to measure. Pass method='estimate'; where that was "
            f"passed, its forward needs tensors with data, and the model has to be made for real. {' '.join(notes)}"
        ) from failure
    found = _size_model(workload, workload.device, sizes, memory=budget, looks_between=looks_between)
    others = ways_besides(workload, workload.device)
    _measure(workload, found, max_seconds=max_seconds / 2 if others else max_seconds)

    def measure_way(sizes: SizeModel, way: Way) -> None:
        _measure(workload, sizes, max_seconds=max_seconds / 2 / len(others), way=way)

    ways, of_ways = _ways(workload, found, workload.device, measure_way)
    return _assembled(found, workload.device, MEASURE, [*notes, *of_ways], dataset_size, ways)


def _ways(
    workload: Workload, found: SizeModel, target: torch.device, run: Callable[[SizeModel, Way], None]
) -> tuple[tuple[FittingWay, ...], list[str]]:
    """The ways that fit; no others than micro-batches are looked at where the batch fits in one piece."""
    if found.memory is None or found.largest() == found.rows:
        return (), []
    return explored(workload, found, ways_besides(workload, target), run)


def first_that_fits(workload: Workload) -> str:
    """The first way in which a single sample should fit into what the device has left; empty where none is found.

    It is estimated, since memory has run out already.
    """
    device = workload.device
    left = available_bytes(device)
    if left is None or not can_be_faked(device):
        return ""
    memory = left + _bytes_in_use(workload)
    for way in ways_besides(workload, device):
        try:
            sizes = _size_model(workload, device, [1], memory=None, looks_between=False)
            estimate(workload, sizes, target=device, way=way)
        except Exception as error:  # noqa: BLE001  # the error that memory ran out is the one to be told
            logger.info("%s: not estimated: %s", way.words, error)
            continue
        peak = sizes.curve().at(1)
        if peak <= memory:
            return (
                f"By an estimate the first way in which one sample fits is {way.words}, with {in_words(peak)} of "
                f"{in_words(memory)}: {way.line(1, has_batch_loss=workload.loss_fn is None)}."
            )
    return ""


def default_sizes(rows: int) -> list[int]:
    """Powers of two below the batch's size, the largest of them if there are many, and the batch's size."""
    powers = [1 << exponent for exponent in range((rows - 1).bit_length())]
    return [*powers[-_MOST_SIZES:], rows]


def _checked_sizes(sizes: Sequence[int] | None, rows: int) -> list[int]:
    if sizes is None:
        return default_sizes(rows)
    wrong = [size for size in sizes if isinstance(size, bool) or not isinstance(size, int)]
    if wrong or not sizes or min(sizes) < 1 or max(sizes) > rows:
        raise WindowError(
            f"micro_batch_sizes={list(sizes)}: each is a number of samples, from 1 to the batch's {rows}. Leave it out "
            "to have powers of two looked at."
        )
    return sorted(set(sizes))


def as_bytes(size: str | int) -> int:
    """A budget in bytes, from a number of them or from text such as "24GiB", "24 GB", "512MiB".

    Raises:
        WindowError: it is not a size, or not above 0.
    """
    found = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        found = round(float(match[1]) * _UNITS.get(match[2].lower(), 0))
        if size.strip().isdigit() and len(size.strip()) > 3:  # 24 is more often a slip than a number of bytes
            found = int(size)
    if found <= 0:
        raise WindowError(
            f"memory={size!r} is no size, so nothing can be said to fit into it. Write a number with its unit, "
            "'24GiB' (2**30 bytes each) or '24GB' (10**9), or the number of bytes, at least 1000."
        )
    return found


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise WindowError(
            f'device={device!r} is no device of torch, so nothing can be planned for it. Pass "cuda", "cpu" or '
            "another that torch.device() takes."
        ) from error


def _elsewhere(workload: Workload, device: torch.device | None) -> tuple[Workload, torch.device, list[str]]:
    """The device to estimate for, and where the fakes are: there, or on the CPU in its place."""
    target = workload.device if device is None else device
    if target.type == "meta":  # where a model is that this machine could not hold: not where it is to be trained
        target = torch.device("cuda")
    if target.type == "cuda" and target.index is None and torch.cuda.is_available():
        target = torch.device("cuda", torch.cuda.current_device())
    if can_be_faked(target):
        return replace(workload, device=target), target, []
    kernels = ", with CUDA's attention, dropout and optimizer steps" if target.type == "cuda" else ""
    note = f"There is no {target.type} here: kernels of the CPU were assumed{kernels}."
    return replace(workload, device=torch.device("cpu")), target, [note]


def _measure(workload: Workload, found: SizeModel, *, max_seconds: float, way: Way = _ALONE) -> None:
    if found.memory is None and (left := available_bytes(workload.device)) is not None:
        found.memory = left + _bytes_in_use(workload)
    guess = copy.deepcopy(found)
    measure(workload, found, max_seconds=max_seconds, way=way)
    if len(found.peaks) < 2:  # a size or two do not fit: how much they would take can still be estimated
        smallest, guess.memory = min(found.failed), None
        try:
            estimate(workload, guess, target=workload.device, way=way)
        except Exception as error:
            raise UnsupportedError(
                f"Micro-batches of {smallest} ran out of memory on {workload.device}, so there is nothing to plan "
                "with, and tensors without data do not do for this model either. Shorten the samples, or use a device "
                "with more memory."
            ) from error
        found.peaks = {**guess.peaks, **found.peaks}
        found.whole = guess.whole
        found.gradient_bytes = found.gradient_bytes or guess.gradient_bytes
        found.notes.append(f"Micro-batches of {smallest} ran out of memory; peaks above that are estimated.")


def _size_model(
    workload: Workload, target: torch.device, sizes: Sequence[int], *, memory: int | None, looks_between: bool
) -> SizeModel:
    """What does not depend on the size; no size has been run yet."""
    optimizers, device = workload.optimizers, workload.device
    parameters = [parameter for model in workload.models for parameter in model.parameters()]
    # Parameters that no model has (a temperature) are the optimizers'.
    parameters += [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    optimizer = optimizer_memory(
        optimizers, device=device, as_on_cuda=is_cuda_elsewhere(device, target), rounded_to=block_bytes(target)
    )
    return SizeModel(
        rows=workload.rows,
        sizes=list(sizes),
        looks_between=looks_between,
        memory=memory,
        parameters=num_bytes(parameters),
        buffers=num_bytes(buffer for model in workload.models for buffer in model.buffers()),
        optimizer_state=optimizer.state,
        optimizer_step=optimizer.step,
        inputs=workload.input_bytes(0, device=target),
        notes=[f"The memory of {name} is not counted: its step could not be run." for name in optimizer.unknown],
    )


def _bytes_in_use(workload: Workload) -> int:
    """What models and optimizers have of the device now, gradients and state included: it is theirs in any budget."""
    tensors = [tensor for model in workload.models for tensor in [*model.parameters(), *model.buffers()]]
    tensors += [tensor for optimizer in workload.optimizers for tensor in tensors_of(optimizer)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return num_bytes(tensor for tensor in tensors if tensor.device == workload.device)


def _assembled(
    found: SizeModel,
    device: torch.device,
    method: str,
    notes: Sequence[str],
    dataset_size: int | None,
    ways: tuple[FittingWay, ...],
) -> Plan:
    curve, rows, memory, largest = found.curve(), found.rows, found.memory, found.largest()
    limit = min(found.failed, default=rows + 1)
    sizes = {*found.sizes, *([largest] if found.looks_between and largest and method == ESTIMATE else [])}
    seconds = found.times.seconds()
    table = tuple(
        Row(
            micro_batch_size=size,
            micro_batches=-(-rows // size),
            peak_bytes=curve.at(size),
            is_measured=size in found.ran,
            seconds=seconds[size] * size if size in seconds else None,
            samples_per_second=1 / seconds[size] if size in seconds else None,
            fits=size < limit and (memory is None or curve.at(size) <= memory),
            updates_per_epoch=None if dataset_size is None else -(-dataset_size // rows),
        )
        for size in sorted(sizes)
    )
    fitting = [row for row in table if row.fits]
    chosen = max(fitting, key=lambda row: (row.samples_per_second or 0.0, row.micro_batch_size), default=None)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" and torch.cuda.is_available() else ""
    return Plan(
        method=method,
        device=f"{device}{name}",
        batch_size=rows,
        memory=memory,
        micro_batch_size=None if chosen is None else chosen.micro_batch_size,
        largest_micro_batch_size=largest,
        rows=table,
        breakdown=Breakdown(
            parameters=found.parameters,
            buffers=found.buffers,
            optimizer_state=found.optimizer_state,
            optimizer_step=found.optimizer_step,
            gradients=found.gradient_bytes,
            activations_per_sample=round(curve.bytes_per_sample),
            temporaries=max(0, round(curve.fixed_bytes - found.resident_bytes - found.gradient_bytes)),
        ),
        ways=ways,
        notes=(*notes, *found.notes),
        _curve=curve,
    )
