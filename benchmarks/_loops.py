"""One update of one job by each library, as its documentation has it; gpt.py and convolution.py time these.

A job is a model, its optimizer, a loss function and the micro-batches of one batch, all of one size. Loops of several
libraries may share a job: each leaves gradients as it found them.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _timing import Loop
from torch import Tensor, nn

import gradaccum as ga

PEERS = {"Accelerate": "accelerate", "Lightning Fabric": "lightning"}
"""The package that each peer comes with."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained.

    Attributes:
        model: on its device.
        optimizer: of all its parameters.
        loss_fn: the mean over the samples of a micro-batch.
        micro_batches: of one update.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[Any, Any], Tensor]
    micro_batches: Sequence[Batch]

    def batch(self) -> Batch:
        """The whole of it."""
        inputs, targets = zip(*self.micro_batches, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def cut(self, rows: int) -> Job:
        """The same in other micro-batches; of as many rows as there are, it is the whole batch."""
        return replace(self, micro_batches=pieces(self.batch(), rows))


def pieces(batch: Batch, rows: int) -> list[Batch]:
    """The batch in micro-batches of so many rows."""
    return list(zip(batch[0].split(rows), batch[1].split(rows), strict=True))


def textbook(job: Job, rows: int | None = None) -> Loop:
    """https://docs.pytorch.org/docs/stable/notes/amp_examples.html#gradient-accumulation, without the scaler.

    Args:
        job: what is trained.
        rows: of a micro-batch, where not as the job is cut.
    """
    job = job if rows is None else job.cut(rows)

    def update() -> None:
        for micro_batch in job.micro_batches:
            loss = job.loss_fn(job.model, micro_batch) / len(job.micro_batches)
            loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad()

    return update


def accumulator(job: Job, **options: Any) -> Loop:
    """`ga.Accumulator` with options of its own."""
    accumulator = ga.Accumulator(job.model, job.optimizer, micro_batches=len(job.micro_batches), **options)

    def update() -> None:
        for micro_batch in accumulator.over(job.micro_batches):
            accumulator.backward(job.loss_fn(job.model, micro_batch))

    return update


def train_step(job: Job, size: Any, **options: Any) -> Loop:
    """`ga.TrainStep`, which cuts the batch itself: into micro-batches of ``size``, or "auto"."""
    batch = job.batch()
    step = ga.TrainStep(job.model, job.optimizer, job.loss_fn, micro_batch_size=size, **options)
    return lambda: step(batch)


def accelerate(job: Job) -> Loop:
    """https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation"""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many jobs
    GradientState._reset_state()
    device = next(job.model.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=len(job.micro_batches))
    model, optimizer = accelerator.prepare(job.model, job.optimizer)

    def update() -> None:
        for micro_batch in job.micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(job.loss_fn(model, micro_batch))
                optimizer.step()
                optimizer.zero_grad()

    return update


def fabric(job: Job) -> Loop:
    """https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html"""
    from lightning.fabric import Fabric

    device = next(job.model.parameters()).device
    fabric = Fabric(accelerator="cpu" if device.type == "cpu" else "gpu", devices=1)
    model, optimizer = fabric.setup(job.model, job.optimizer)
    last = len(job.micro_batches) - 1

    def update() -> None:
        for i, micro_batch in enumerate(job.micro_batches):
            with fabric.no_backward_sync(model, enabled=i != last):
                fabric.backward(job.loss_fn(model, micro_batch) / len(job.micro_batches))
        optimizer.step()
        optimizer.zero_grad()

    return update


def gradient_of(job: Job, loop: Loop) -> Tensor:
    """What the optimizer is given by one run of a loop, flat and in float64; the model is then as it was."""
    seen: list[Tensor] = []

    def keep(*_: object) -> None:
        seen.append(torch.cat([p.grad.double().flatten() for p in job.model.parameters() if p.grad is not None]))

    start = copy.deepcopy(job.model.state_dict())
    handle = job.optimizer.register_step_pre_hook(keep)
    loop()
    handle.remove()
    job.model.load_state_dict(start)
    (gradient,) = seen
    return gradient


def exact_gradient(job: Job) -> Tensor:
    """The whole batch's in float64, flat: what all loops are held against."""
    model = copy.deepcopy(job.model).double()
    inputs, targets = job.batch()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    gradients = torch.autograd.grad(job.loss_fn(model, (inputs, targets)), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def error(gradient: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm over all parameters."""
    return float((gradient - exact).norm() / exact.norm())


def peers() -> dict[str, Callable[[Job], Loop]]:
    """What makes the loops of the peers that are installed."""
    make = {"Accelerate": accelerate, "Lightning Fabric": fabric}
    return {name: make[name] for name, package in PEERS.items() if is_installed(package, name)}


def is_installed(package: str, name: str) -> bool:
    """Whether a peer can be measured; says so where it cannot."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{name} is not installed: left out")
    return found
