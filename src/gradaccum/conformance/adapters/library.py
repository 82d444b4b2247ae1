"""This library: the accumulator's loop, whole batches in hand, and the trainers of other people made exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradaccum as ga
from gradaccum.conformance.adapters.loops import accelerate_loop
from gradaccum.conformance.adapters.trainers import lightning_trainer, transformers_trainer
from gradaccum.conformance.scenarios import NotOffered

_FOR_WHOLE_BATCHES = "the loss or a layer sees the whole batch, which is what gradaccum.TrainStep is for"


def accumulator(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, scaler: Any = None, weight: Any = ga.weight_of,
    terms: Any = None, batch_loss: Any = None, folder: str | None = None, stop_after: int | None = None,
    processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """The loop of the README. What a loss is a mean over is said, or read off its graph where it is not."""
    if batch_loss is not None or _has_batch_norm(model):
        raise NotOffered(_FOR_WHOLE_BATCHES)
    model = model if processes == 1 else DistributedDataParallel(model)
    weights = None if terms is None else lambda batch: {name: over for name, (_, over) in terms(model, batch).items()}
    accumulator = ga.Accumulator(
        model, optimizer, micro_batches=micro_batches, clip_norm=clip_norm, scheduler=scheduler, scaler=scaler,
        weights=weights,
    )  # fmt: skip
    checkpoint = None if folder is None else ga.Checkpoint(folder, model=model, accumulator=accumulator)
    seen = 0 if checkpoint is None or checkpoint.load() is None else accumulator.micro_batches
    losses: list[float] = []
    for _ in range(epochs):
        for batch in accumulator.over(itertools.islice(batches, seen, None)):
            update = accumulator.backward(_declared(loss, model, batch, weight, terms))
            if update:
                losses.append(update.loss.item())
                if checkpoint is not None:
                    checkpoint.save()  # inside of a window it would refuse to
            seen += 1
            if seen == stop_after:
                return model.parameters(), losses
        seen = 0
    return model.parameters(), losses


def train_step(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, scaler: Any = None, weight: Any = ga.weight_of,
    terms: Any = None, forward: Any = None, batch_loss: Any = None, combine: Any = "concat", processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """Whole batches in hand: the loader's micro-batches joined, and cut again by the step."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return _declared(loss, model, batch, weight, terms)

    model = model if processes == 1 else DistributedDataParallel(model)
    size = batches.batch_size
    options: dict[str, Any] = {"loss_fn": loss_fn}
    if batch_loss is not None:
        options = {"forward": forward, "batch_loss": batch_loss, "combine": combine}
    elif terms is not None:
        options["weights"] = lambda batch: {name: over for name, (_, over) in terms(model, batch).items()}
    step = ga.TrainStep(
        model, optimizer, **options, micro_batch_size=size, clip_norm=clip_norm, scheduler=scheduler, scaler=scaler,
        batch_norm="exact" if _has_batch_norm(model) else "micro",
    )  # fmt: skip
    losses = [step(batch).loss.item() for _ in range(epochs) for batch in _joined(batches, micro_batches)]
    return model.parameters(), losses


def exact_accelerate(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, folder: str | None = None, stop_after: int | None = None,
    processes: int = 1,
) -> tuple[Iterable[Tensor], list[float] | None]:  # fmt: skip
    """Accelerate's documented loop after ``exact(accelerator)``."""
    from gradaccum.integrations import exact

    return accelerate_loop(
        exact, model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs, clip_norm=clip_norm,
        scheduler=scheduler, folder=folder, stop_after=stop_after, processes=processes,
    )  # fmt: skip


def exact_lightning(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """Lightning's trainer with one callback more, and the loss that it logs."""
    from gradaccum.integrations.lightning import ExactAccumulation

    return lightning_trainer(
        [ExactAccumulation(log="batch_loss")], "batch_loss", model, optimizer, loss, batches,
        micro_batches=micro_batches, epochs=epochs, clip_norm=clip_norm, scheduler=scheduler, processes=processes,
    )  # fmt: skip


def exact_transformers(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """Transformers' trainer as `ExactTrainer`."""
    from gradaccum.integrations.transformers import ExactTrainer

    return transformers_trainer(
        ExactTrainer, model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs, clip_norm=clip_norm,
        scheduler=scheduler, processes=processes,
    )  # fmt: skip


def _declared(loss: Callable[..., Tensor], model: nn.Module, batch: Any, weight: Any, terms: Any) -> Any:
    """The loss with what it is a mean over."""
    if terms is not None:
        return {name: ga.Loss.mean(mean, over=over) for name, (mean, over) in terms(model, batch).items()}
    value = loss(model, batch)
    if weight is ga.weight_of:
        return ga.weight_of(value)
    over = weight(batch)
    return ga.Loss.sum(value) if over is None else ga.Loss.mean(value, over=over)


def _joined(batches: Any, micro_batches: int) -> Iterator[tuple[Tensor, ...]]:
    """The whole batches of an epoch."""
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, micro_batches)):
        yield tuple(torch.cat(parts) for parts in zip(*window, strict=True))


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
