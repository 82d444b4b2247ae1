"""What was found at each size and what does not depend on it, put together into a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from gradaccum.fit.curve import Curve
from gradaccum.fit.estimate import block_bytes, is_cuda_elsewhere
from gradaccum.fit.findings import Findings
from gradaccum.fit.plan import Breakdown, Plan, Row
from gradaccum.fit.probe import Task, num_bytes
from gradaccum.memory.optimizer_memory import OptimizerMemory, optimizer_memory, tensors_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants to know.

    Attributes:
        optimizers: none where none was passed.
        sizes: ascending.
        looks_between: whether the largest size that fits is added to these.
        memory: the budget in bytes, where one was given.
        dataset_size: samples of an epoch, where it was given.
        max_seconds: about how long to measure.
    """

    optimizers: Sequence[Optimizer]
    sizes: Sequence[int]
    looks_between: bool
    memory: int | None
    dataset_size: int | None
    max_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes that are there whatever runs, and what an optimizer's step takes besides."""

    parameters: int
    buffers: int
    optimizer: OptimizerMemory

    @property
    def bytes(self) -> int:
        """All of it, without gradients."""
        return self.parameters + self.buffers + self.optimizer.state


def held_by(task: Task, optimizers: Sequence[Optimizer]) -> Held:
    """What models and optimizers hold on the task's device, parameters that no model has (a temperature) included."""
    of_models = [parameter for model in task.models for parameter in model.parameters()]
    of_optimizers = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return Held(
        parameters=num_bytes([*of_models, *of_optimizers]),
        buffers=num_bytes(buffer for model in task.models for buffer in model.buffers()),
        optimizer=optimizer_memory(
            optimizers, device=task.device, as_on_cuda=is_cuda_elsewhere(task), rounded_to=block_bytes(task.target)
        ),
    )


def bytes_in_use(task: Task, optimizers: Sequence[Optimizer]) -> int:
    """What models and optimizers have of the device now, gradients and state included: it is theirs in any budget."""
    of_models = [tensor for model in task.models for tensor in [*model.parameters(), *model.buffers()]]
    of_optimizers = [tensor for optimizer in optimizers for tensor in tensors_of(optimizer)]
    gradients = [tensor.grad for tensor in [*of_models, *of_optimizers] if tensor.is_leaf and tensor.grad is not None]
    return num_bytes(tensor for tensor in [*of_models, *of_optimizers, *gradients] if tensor.device == task.device)


def assemble(
    task: Task, asked: Asked, found: Findings, held: Held, *, memory: int | None, method: str, notes: Sequence[str]
) -> Plan:
    """The plan.

    Args:
        task: what was planned.
        asked: what the user wants to know.
        found: at least two peaks.
        held: what comes on top of these.
        memory: the budget in bytes.
        method: how it was found out.
        notes: what else the user should know.
    """
    curve = found.curve(resident=held.bytes)
    limit = min(found.failed, default=task.batch_size + 1)  # from here on nothing fits, whatever is predicted
    largest = task.batch_size if memory is None else curve.largest(memory, task.batch_size)
    if largest is not None:
        largest = min(largest, limit - 1) or None
    sizes = set(found.sizes)
    if asked.looks_between and largest is not None and method != "measure":
        sizes.add(largest)
    rows = tuple(_row(size, task, asked, found, curve, memory=memory, limit=limit) for size in sorted(sizes))
    fixed = curve.fixed_bytes - held.bytes - found.gradient_bytes
    unknown = [f"The memory of {name} is not counted: its step could not be run." for name in held.optimizer.unknown]
    return Plan(
        method=method,
        device=_described(task.target),
        batch_size=task.batch_size,
        memory=memory,
        micro_batch_size=_chosen(rows),
        largest_micro_batch_size=largest,
        rows=rows,
        breakdown=Breakdown(
            parameters=held.parameters,
            buffers=held.buffers,
            gradients=found.gradient_bytes,
            optimizer_state=held.optimizer.state,
            optimizer_step=held.optimizer.step,
            activations_per_sample=round(curve.bytes_per_sample),
            temporaries=max(0, round(fixed)),
        ),
        notes=(*notes, *found.notes, *unknown),
        _curve=curve,
    )


def _row(size: int, task: Task, asked: Asked, found: Findings, curve: Curve, *, memory: int | None, limit: int) -> Row:
    peak = curve.at(size)
    seconds = found.seconds.get(size)
    return Row(
        micro_batch_size=size,
        micro_batches=-(-task.batch_size // size),
        peak_bytes=peak,
        is_measured=size in found.ran,
        seconds=seconds,
        samples_per_second=None if seconds is None else size / seconds,
        fits=size < limit and (memory is None or peak <= memory),
        updates_per_epoch=None if asked.dataset_size is None else -(-asked.dataset_size // task.batch_size),
    )


def _chosen(rows: Sequence[Row]) -> int | None:
    """The fastest size that fits; the largest where none was timed."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    return max(fitting, key=lambda row: (row.samples_per_second or 0.0, row.micro_batch_size)).micro_batch_size


def _described(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
