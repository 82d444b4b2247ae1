"""Trainers that run the loop themselves: Lightning's, Transformers' and Ignite's."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate


def lightning(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """As in https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html#accumulate-gradients.

    Reported is what ``self.log("loss", loss)`` leaves in ``trainer.callback_metrics`` at the end of an update.
    """
    return lightning_trainer(
        [], "loss", model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs, clip_norm=clip_norm,
        scheduler=scheduler, processes=processes,
    )  # fmt: skip


def lightning_trainer(
    callbacks: list[Any], reported: str, model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *,
    micro_batches: int, epochs: int, clip_norm: float | None, scheduler: Any, processes: int,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """The trainer with callbacks; ``reported`` is the name of a logged loss."""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its import sets it to INFO
    losses: list[float] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            value = loss(self.model, batch)
            self.log("loss", value, batch_size=len(batch[0]))
            return value

        def configure_optimizers(self) -> Any:
            if scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Reports(L.Callback):
        updates = 0

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step > self.updates:
                self.updates = trainer.global_step
                losses.append(trainer.callback_metrics[reported].item())

    is_double = next(model.parameters()).dtype is torch.float64
    trainer = L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=clip_norm,
        precision="64-true" if is_double else "32-true",
        callbacks=[*callbacks, Reports()],
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        use_distributed_sampler=False,  # the loader has a process's own share already
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches)
    return model.parameters(), losses


def transformers(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    clip_norm: float | None = None, scheduler: Any = None, processes: int = 1,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """https://huggingface.co/docs/transformers/trainer: ``compute_loss`` of a subclass, as for any loss of one's own.

    Reported is the loss of its log, one for each update.
    """
    from transformers import Trainer

    return transformers_trainer(
        Trainer, model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs, clip_norm=clip_norm,
        scheduler=scheduler, processes=processes,
    )  # fmt: skip


def transformers_trainer(
    base: Any, model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int,
    epochs: int, clip_norm: float | None, scheduler: Any, processes: int,
) -> tuple[Iterable[Tensor], list[float]]:  # fmt: skip
    """A ``Trainer`` class that trains."""
    import transformers
    from accelerate.data_loader import prepare_data_loader

    transformers.logging.set_verbosity_error()

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"batch": default_collate(rows)}

    class WithLoss(base):
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(batches.dataset, batches.batch_size, collate_fn=collate)  # the same order, as dicts
            if processes > 1:  # the loader has a process's own share already, which `prepare` would cut again
                return prepare_data_loader(loader, num_processes=1)
            return self.accelerator.prepare(loader)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            value = loss(model, inputs["batch"])
            return (value, {}) if return_outputs else value

    length: dict[str, Any] = {"num_train_epochs": epochs}
    if not hasattr(batches.dataset, "__len__"):  # it wants to know how many updates a stream has
        length = {"max_steps": epochs * math.ceil(sum(1 for _ in batches) / micro_batches)}
    with TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batches.batch_size, max_grad_norm=clip_norm or 0.0,
            gradient_accumulation_steps=micro_batches, save_strategy="no", logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, **length,
        )  # fmt: skip
        scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = WithLoss(
            model=model, args=arguments, train_dataset=batches.dataset, optimizers=(optimizer, scheduler)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model.parameters(), [log["loss"] for log in trainer.state.log_history if "loss" in log]


def ignite(
    model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], batches: Any, *, micro_batches: int, epochs: int,
    processes: int = 1,
) -> tuple[Iterable[Tensor], None]:  # fmt: skip
    """Ignite's own step, as https://docs.pytorch.org/ignite/engine.html has it; it reports no update's loss.

    An engine counts iterations through all epochs, so that a window goes on into the next one.
    """
    engine: Any = importlib.import_module("ignite.engine")
    step = engine.supervised_training_step(
        model if processes == 1 else DistributedDataParallel(model),
        optimizer,
        loss_fn=lambda value, _: value,
        prepare_batch=lambda batch, device, non_blocking: (batch, None),
        model_fn=loss,
        gradient_accumulation_steps=micro_batches,
    )
    engine.Engine(step).run(batches, max_epochs=epochs)
    return model.parameters(), None
