"""Loops that the user writes: the textbook's, Accelerate's and Fabric's, as their documentation has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def textbook(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, scaler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """The loop of https://docs.pytorch.org/docs/stable/notes/amp_examples.html#gradient-accumulation.

    A loop over a loader of known length takes its last micro-batch for a window's last; a stream's len() raises.
    In several processes the model is DDP's, which averages gradients at every micro-batch; `no_sync` would give the
    same sums.
    """
    model = model if processes == 1 else DistributedDataParallel(model)
    last = len(batches) if hasattr(batches.dataset, "__len__") else None
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses: list[float] = []
    for _ in range(epochs):
        running = 0.0
        for i, batch in enumerate(batches):
            value = loss(model, batch) / micro_batches
            scaler.scale(value).backward()
            running += value.item()
            if (i + 1) % micro_batches == 0 or i + 1 == last:
                if clip_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                scaler.step(optimizer)
                scaler.update()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
                losses.append(running)
                running = 0.0
    return model.parameters(), losses


def accelerate(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, folder: str | None = None, stop_after: int | None = None,
    processes: int = 1,
) -> tuple[Iterable[Tensor], list[float] | None]:  # fmt: skip
    """The loop of https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation.

    The same page has another loop, of 30 lines, for means over tokens: it divides by hand what `accumulate` would not.
    Saved and resumed as its page on checkpoints has it, by `save_state` and `skip_first_batches`. No loss is reported.
    """
    return accelerate_loop(
        lambda accelerator: accelerator, model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs,
        clip_norm=clip_norm, scheduler=scheduler, folder=folder, stop_after=stop_after, processes=processes,
    )  # fmt: skip


def accelerate_loop(
    prepared: Callable[[Any], Any], model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *,
    micro_batches: int, epochs: int, clip_norm: float | None, scheduler: Any, folder: str | None,
    stop_after: int | None, processes: int,
) -> tuple[Iterable[Tensor], list[float] | None]:  # fmt: skip
    """The loop with an accelerator that ``prepared`` may have changed; made exact, it has each window's loss.

    A loader that `prepare` is given is shared out between processes; this one has a process's own share already.
    """
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many trainings
    GradientState._reset_state()
    accelerator = prepared(Accelerator(cpu=True, gradient_accumulation_steps=micro_batches))
    model, optimizer = accelerator.prepare(model, optimizer)
    loader: Any = accelerator.prepare(batches) if processes == 1 else prepare_data_loader(batches, num_processes=1)
    scheduler = None if scheduler is None else accelerator.prepare(scheduler)
    losses: list[float] | None = [] if hasattr(accelerator, "exact") else None
    if losses is not None:
        accelerator.register_for_checkpointing(accelerator.exact)
    seen = 0
    state = None if folder is None else Path(folder, "state")
    if state is not None and state.exists():
        accelerator.load_state(str(state))
        seen = int(Path(folder or "", "seen").read_text(encoding="utf-8"))
        loader = accelerator.skip_first_batches(loader, seen)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, batch))
                if accelerator.sync_gradients and clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
            if losses is not None and accelerator.sync_gradients:
                losses.append(accelerator.exact.loss.item())
            seen += 1
            if seen == stop_after and folder is not None:
                accelerator.save_state(str(state))
                Path(folder, "seen").write_text(str(seen), encoding="utf-8")
                return model.parameters(), losses
    return accelerator.unwrap_model(model).parameters(), losses


def fabric(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], None]:  # fmt: skip
    """The loop of https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html, mended.

    In its favour: that page's loop steps after its first micro-batch (``iteration % 8 != 0``, from 0) and divides
    nothing. Here micro-batches are counted from 1 and losses divided, as in the textbook loop.
    """
    from lightning.fabric import Fabric

    plain = model
    is_double = next(model.parameters()).dtype is torch.float64
    fabric = Fabric(
        accelerator="cpu", devices=processes, strategy="auto" if processes == 1 else "ddp",
        precision="64-true" if is_double else "32-true",
    )  # fmt: skip
    fabric.launch()
    wrapped: Any = None
    wrapped, optimizer = fabric.setup(model, optimizer)
    for _ in range(epochs):
        for iteration, batch in enumerate(batches, 1):
            is_accumulating = iteration % micro_batches != 0
            with fabric.no_backward_sync(wrapped, enabled=is_accumulating):
                fabric.backward(loss(wrapped, batch) / micro_batches)
            if not is_accumulating:
                if clip_norm is not None:
                    fabric.clip_gradients(wrapped, optimizer, max_norm=clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return plain.parameters(), None
