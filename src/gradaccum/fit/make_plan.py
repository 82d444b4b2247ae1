"""`plan`: what an update of a batch takes at each micro-batch size, and which size to take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradaccum import tree
from gradaccum.errors import BatchError, ParameterError, UnsupportedError, WindowError
from gradaccum.fit.assemble import Asked, assemble, bytes_in_use, held_by
from gradaccum.fit.estimate import estimate
from gradaccum.fit.findings import default_sizes
from gradaccum.fit.measure import measure
from gradaccum.fit.plan import Plan
from gradaccum.fit.probe import Task
from gradaccum.fit.units import as_bytes
from gradaccum.memory.available import available_bytes
from gradaccum.memory.fakes import can_be_faked
from gradaccum.window import guards

logger = logging.getLogger(__name__)

MEASURE, ESTIMATE = "measure", "estimate"
# Of what a CUDA device has free: what cannot be had in one piece stays out of a budget that nobody gave.


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
    device: str | torch.device | None = None,
    dataset_size: int | None = None,
    max_seconds: float = 60.0,
) -> Plan:
    """Finds out what fits into memory, and what is fastest.

    The peak of an update is what is there anyway (parameters, gradients, optimizer state) and what a micro-batch of n
    samples adds, which is affine in n: a few sizes give the rest. Model, buffers, optimizer, gradients and random state
    are left as they were.

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
        device: for estimates, the device to estimate for, such as "cuda" on a machine that has none; by default the
            model's own, and "cuda" for a model on the meta device.
        dataset_size: samples of an epoch, to tell its updates.
        max_seconds: about how long to measure.

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
    _check_options(method, loss_fn, forward, batch_loss, max_seconds)
    models: list[nn.Module] = guards.as_sequence(model, nn.Module, name="model")
    guards.refuse_data_parallel(models)
    batch_size = _rows(batch)
    task = Task(
        models=models, model=model, loss_fn=loss_fn, forward=forward, batch_loss=batch_loss, batch=batch,
        batch_size=batch_size, device=_device_of(models), target=_device_of(models),
    )  # fmt: skip
    asked = Asked(
        optimizers=[] if optimizer is None else guards.as_sequence(optimizer, Optimizer, name="optimizer"),
        sizes=default_sizes(batch_size) if micro_batch_sizes is None else _checked(micro_batch_sizes, batch_size),
        looks_between=micro_batch_sizes is None,
        memory=None if memory is None else as_bytes(memory),
        dataset_size=dataset_size,
        max_seconds=max_seconds,
    )
    if method == MEASURE and device is not None and torch.device(device).type != task.device.type:
        raise WindowError(
            f"method='measure' runs on the model's own device, {task.device}, and device={str(device)!r} was asked "
            "for. Move the model there, or pass method='estimate', which needs no device."
        )
    return _made(task, asked, method=method, device=device)


def _made(task: Task, asked: Asked, *, method: str, device: str | torch.device | None) -> Plan:
    """The plan by the method that was asked for, or, where nothing can be estimated, by measuring."""
    notes = _remarks(task.models, asked)
    failure: Exception | None = None
    if method == ESTIMATE:
        elsewhere, note = _elsewhere(task, device)
        try:
            return _estimated(elsewhere, asked, notes=[*notes, *note])
        except Exception as error:  # noqa: BLE001  # anything may come of tensors without data; a real mistake comes again
            failure, reason = error, (str(error) or repr(error)).splitlines()[0]
        logger.info("no estimate is possible, measuring instead: %s", reason)
        notes.append(f"Measured on {task.device}, since the forward needs tensors with data: {reason}")
    if task.device.type == "meta":
        raise UnsupportedError(
            "The model is on the meta device, which has no memory to measure. Pass method='estimate'; where that was "
            f"passed, its forward needs tensors with data, and the model has to be made for real. {' '.join(notes)}"
        ) from failure
    return _measured(task, asked, notes=notes)


def _estimated(task: Task, asked: Asked, *, notes: list[str]) -> Plan:
    held = held_by(task, asked.optimizers)
    spare = None if asked.memory is None else asked.memory - held.bytes
    step_bytes = held.optimizer.step + task.input_bytes(0)
    found = estimate(task, asked.sizes, optimizers=asked.optimizers, spare=spare, step_bytes=step_bytes)
    return assemble(task, asked, found, held, memory=asked.memory, method=ESTIMATE, notes=notes)


def _measured(task: Task, asked: Asked, *, notes: list[str]) -> Plan:
    held = held_by(task, asked.optimizers)
    memory = asked.memory
    if memory is None:
        left = available_bytes(task.device)
        memory = None if left is None else left + bytes_in_use(task, asked.optimizers)
    spare = None if memory is None else memory - held.bytes
    found = measure(
        task, asked.sizes, optimizers=asked.optimizers, spare=spare,
        step_bytes=held.optimizer.step + task.input_bytes(0), max_seconds=asked.max_seconds,
        looks_between=asked.looks_between,
    )  # fmt: skip
    if len(found.peaks) < 2:  # a size or two do not fit: how much they would take can still be estimated
        try:
            estimated = estimate(task, asked.sizes, optimizers=asked.optimizers)
        except Exception as error:
            raise UnsupportedError(
                f"Micro-batches of {min(found.failed)} ran out of memory on {task.device}, so there is nothing to plan "
                "with, and tensors without data do not do for this model either. Shorten the samples, or use a device "
                "with more memory."
            ) from error
        found.peaks = {**estimated.peaks, **found.peaks}
        found.whole = estimated.whole
        found.gradient_bytes = found.gradient_bytes or estimated.gradient_bytes
        notes.append(f"Micro-batches of {min(found.failed)} ran out of memory; peaks above that are estimated.")
    return assemble(task, asked, found, held, memory=memory, method=MEASURE, notes=notes)


def _elsewhere(task: Task, device: str | torch.device | None) -> tuple[Task, list[str]]:
    """The task on the device that it is to be estimated for; where there is none, on the CPU in its place."""
    target = torch.device(device) if device is not None else task.target
    if target.type == "meta":  # where a model is that this machine could not hold: not where it is to be trained
        target = torch.device("cuda")
    if target.type == "cuda" and target.index is None and torch.cuda.is_available():
        target = torch.device("cuda", torch.cuda.current_device())
    if can_be_faked(target):
        return replace(task, device=target, target=target), []
    note = f"There is no {target.type} here: kernels of the CPU were assumed" + (
        ", with CUDA's attention, dropout and optimizer steps." if target.type == "cuda" else "."
    )
    return replace(task, device=torch.device("cpu"), target=target), [note]


def _remarks(models: Sequence[nn.Module], asked: Asked) -> list[str]:
    """What makes the numbers other than those of the training to come."""
    notes: list[str] = []
    if not asked.optimizers:
        notes.append("No optimizer was passed, so its state is not counted: Adam's is twice the parameters.")
    if not any(module.training for model in models for module in model.modules()):
        notes.append("The model is in eval mode, in which some layers keep less for backward: model.train().")
    return notes


def _device_of(models: Sequence[nn.Module]) -> torch.device:
    parameters = [parameter for model in models for parameter in model.parameters()]
    if any(is_lazy(parameter) for parameter in parameters):
        raise ParameterError(
            "Some parameters have no shape yet, so their memory is unknown. Run one forward of the lazy modules first."
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise ParameterError(
            f"There is nothing to train: none of the {len(parameters)} parameters requires a gradient, so no backward "
            "can be run. Call parameter.requires_grad_() on those to train."
        )
    return parameters[0].device


def _rows(batch: Any) -> int:
    rows = tree.rows(batch)
    if rows == 0:
        raise BatchError("The batch has 0 rows, and nothing can be run with it. Pass a batch as it is trained with.")
    return rows


def _checked(sizes: Sequence[int], batch_size: int) -> list[int]:
    wrong = [size for size in sizes if isinstance(size, bool) or not isinstance(size, int)]
    if wrong or not sizes or min(sizes) < 1 or max(sizes) > batch_size:
        raise WindowError(
            f"micro_batch_sizes={list(sizes)}: each is a number of samples, from 1 to the batch's {batch_size}. Leave "
            "it out to have powers of two looked at."
        )
    return sorted(set(sizes))


def _check_options(method: str, loss_fn: Any, forward: Any, batch_loss: Any, max_seconds: float) -> None:
    if method not in (MEASURE, ESTIMATE):
        raise WindowError(
            f"method={method!r} is not known. 'measure' runs micro-batches on the device at hand, 'estimate' counts "
            "without one."
        )
    if not callable(loss_fn) and not (loss_fn is None and callable(forward) and callable(batch_loss)):
        raise WindowError(
            f"loss_fn is {type(loss_fn).__name__}, forward {type(forward).__name__} and batch_loss "
            f"{type(batch_loss).__name__}. Pass loss_fn(model, micro_batch), or in its place both "
            "forward=forward(model, micro_batch) and batch_loss=batch_loss(outputs, batch)."
        )
    if loss_fn is not None and (forward is not None or batch_loss is not None):
        raise WindowError("loss_fn and forward= or batch_loss= say two things. Pass loss_fn, or the other two.")
    if not max_seconds > 0:
        raise WindowError(f"max_seconds={max_seconds!r} leaves no time to measure in. Pass a number above 0.")
