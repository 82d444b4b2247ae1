"""What goes wrong, and where: training with accumulation against training on the whole batch.

    python benchmarks/scenarios.py [--json FILE]

Each scenario trains a small model in float32 by the textbook loop, Accelerate, Lightning's Trainer,
Transformers' Trainer and gradaccum, each written as its documentation recommends, and gives the relative error of
the trained parameters against whole-batch training in float64, |p - P| / |P|. Whole-batch training in float32 stands
beside them: what rounding alone costs.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import FOLDER, write_results
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gradaccum as ga

MICRO_BATCH, ACCUM_ITER = 10, 4
BATCH = MICRO_BATCH * ACCUM_ITER


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A task on which accumulation may or may not give the whole batch's result."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    criterion: nn.Module
    epochs: int = 3
    lr: float = 0.05
    adamw: bool = False
    clip_norm: float | None = None
    decay: float | None = None
    """What the learning rate is multiplied by at every update."""
    is_stream: bool = False
    is_over_the_batch: bool = False
    """Whether the loss couples samples, so that it has to see the whole batch's outputs."""
    has_batch_norm: bool = False
    """Whether layers couple samples, so that they have to see the whole batch."""
    bound: float = 1e-6
    """What gradaccum promises, in float32."""

    def loader(self, batch_size: int, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
        data = TensorDataset(*(t.to(dtype) if t.is_floating_point() else t for t in (self.x, self.y)))
        return DataLoader(Stream(data) if self.is_stream else data, batch_size=batch_size)

    def start(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR | None]:
        model = copy.deepcopy(self.model).to(dtype)
        if self.adamw:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr)
        return model, optimizer, self.schedule(optimizer)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR | None:
        decay = self.decay
        return None if decay is None else LambdaLR(optimizer, lambda update: decay**update)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


# --------------------------------------------------------------------------------------------------------------- loops
def whole_batch(s: Scenario, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, optimizer, scheduler = s.start(dtype)
    criterion = copy.deepcopy(s.criterion).to(dtype)  # class weights
    for _ in range(s.epochs):
        for x, y in s.loader(BATCH, dtype):
            criterion(model(x), y).backward()
            if s.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), s.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    return model


def textbook_loop(s: Scenario) -> nn.Module:
    model, optimizer, scheduler = s.start()
    loader = s.loader(MICRO_BATCH)
    num_batches = None if s.is_stream else len(loader)  # a stream's len() raises: the loop can't know where it ends
    for _ in range(s.epochs):
        for batch_idx, (x, y) in enumerate(loader):
            loss = s.criterion(model(x), y) / ACCUM_ITER
            loss.backward()
            if (batch_idx + 1) % ACCUM_ITER == 0 or batch_idx + 1 == num_batches:
                if s.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), s.clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return model


def accelerate(s: Scenario) -> nn.Module:
    """https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation

    The same page has another loop, of 30 lines, for means over tokens: it divides by hand what `accumulate` would not.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many scenarios
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUM_ITER)
    model, optimizer, scheduler = s.start()
    model, optimizer, loader = accelerator.prepare(model, optimizer, s.loader(MICRO_BATCH))
    scheduler = None if scheduler is None else accelerator.prepare(scheduler)
    for _ in range(s.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(s.criterion(model(x), y))
                if accelerator.sync_gradients and s.clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), s.clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def lightning(s: Scenario) -> nn.Module:
    """https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html#accumulate-gradients"""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its import sets it to INFO

    model, optimizer, scheduler = s.start()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return s.criterion(self.model(x), y)

        def configure_optimizers(self) -> Any:
            if scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer = L.Trainer(
        max_epochs=s.epochs,
        accumulate_grad_batches=ACCUM_ITER,
        gradient_clip_val=s.clip_norm,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), s.loader(MICRO_BATCH))
    return model


def trainer(s: Scenario) -> nn.Module:
    """https://huggingface.co/docs/transformers/trainer: a model that computes its own loss, and takes no ``**kwargs``.

    A causal language model of the library is another matter: it is handed the number of tokens of the window.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    model, optimizer, scheduler = s.start()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = self.model(x)
            return {"loss": s.criterion(output, labels), "logits": output}

    rows = [{"x": x, "labels": y} for x, y in zip(s.x, s.y, strict=True)]
    updates = -(-len(rows) // BATCH) * s.epochs
    arguments = transformers.TrainingArguments(
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUM_ITER,
        num_train_epochs=s.epochs,
        max_steps=updates if s.is_stream else -1,
        max_grad_norm=s.clip_norm or 0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made = transformers.Trainer(
        model=Model(), args=arguments, train_dataset=Stream(rows) if s.is_stream else rows,
        data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in ("x", "labels")},
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    return model


def gradaccum(s: Scenario) -> nn.Module:
    model, optimizer, scheduler = s.start()
    if s.is_over_the_batch:
        step = ga.TrainStep(
            model, optimizer, forward=lambda model, batch: model(batch[0]),
            batch_loss=lambda output, batch: s.criterion(output, batch[1]), micro_batch_size=MICRO_BATCH,
        )  # fmt: skip
        return train_whole_batches(s, step, model)
    if s.has_batch_norm:
        step = ga.TrainStep(
            model, optimizer, lambda model, batch: s.criterion(model(batch[0]), batch[1]),
            batch_norm="exact", micro_batch_size=MICRO_BATCH,
        )  # fmt: skip
        return train_whole_batches(s, step, model)
    criterion = ga.criterion(s.criterion)
    accumulator = ga.Accumulator(model, optimizer, batch_size=BATCH, clip_norm=s.clip_norm, scheduler=scheduler)
    for _ in range(s.epochs):
        for x, y in accumulator.over(s.loader(MICRO_BATCH)):
            accumulator.backward(criterion(model(x), y))
    return model


def train_whole_batches(s: Scenario, step: ga.TrainStep, model: nn.Module) -> nn.Module:
    for _ in range(s.epochs):
        for batch in s.loader(BATCH):
            step(batch)
    return model


LOOPS: dict[str, Callable[[Scenario], nn.Module]] = {
    "whole batch": whole_batch,
    "textbook loop": textbook_loop,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "Trainer": trainer,
    "gradaccum": gradaccum,
}


# ----------------------------------------------------------------------------------------------------------- scenarios
class TokenClassifier(nn.Module):
    """Logits ``[rows, classes, length]``, as cross-entropy wants them."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(1, 2)


class PairLoss(nn.Module):
    """InfoNCE: every sample's positive is its own target, all other targets of the batch are its negatives."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        similarity = F.normalize(output, dim=1) @ F.normalize(target, dim=1).T
        return F.cross_entropy(similarity / 0.1, torch.arange(len(output)))


def scenarios() -> list[Scenario]:
    torch.manual_seed(0)
    features, classes, length = 8, 3, 12
    num_full, num_short_window, num_short_micro_batch = 6 * BATCH, 6 * BATCH - 2 * MICRO_BATCH, 6 * BATCH - 7
    x = torch.randn(num_full, features)
    y = torch.sin(x).sum(dim=1, keepdim=True)
    mlp = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 1))
    full = Scenario(name="equal micro-batches, full windows", model=mlp, x=x, y=y, criterion=nn.MSELoss())

    def cut(name: str, num_samples: int, **changes: Any) -> Scenario:
        return replace(full, name=name, x=x[:num_samples], y=y[:num_samples], **changes)

    sequences = torch.randn(num_full, length, features)
    labels = sequences[..., :classes].argmax(dim=2)
    lengths = torch.randint(1, length + 1, (num_full, 1))
    masked = labels.where(torch.arange(length) < lengths, -100)

    rare = (x[:, 0] > 1.5).long() + (x[:, 1] > 1.5).long()  # 0: about 87%, 1: 12%, 2: 0.4%
    class_weights = torch.tensor([1.0, 8.0, 60.0])
    classifier = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes))

    normed = nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    encoder = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, features))
    return [
        full,
        cut("short last window", num_short_window),
        cut("short last micro-batch", num_short_micro_batch),
        cut("window longer than the epoch", 2 * MICRO_BATCH, epochs=20),
        Scenario(
            name="mean over tokens, ignored labels", model=TokenClassifier(features, classes), x=sequences, y=masked,
            criterion=nn.CrossEntropyLoss(ignore_index=-100), lr=0.5, bound=1e-5,
        ),
        Scenario(
            name="class-weighted cross-entropy", model=classifier, x=x, y=rare,
            criterion=nn.CrossEntropyLoss(weight=class_weights), lr=0.5, bound=1e-5,
        ),
        replace(full, name="clipping by norm", clip_norm=0.1, bound=1e-5),
        cut("schedule per update, short last window", num_short_window, decay=0.9),
        cut("AdamW, short last micro-batch", num_short_micro_batch, adamw=True, lr=0.01, bound=1e-4),
        cut("stream without a length", num_short_window, is_stream=True),
        replace(full, name="BatchNorm", model=normed, has_batch_norm=True, bound=1e-5),
        Scenario(
            name="contrastive loss", model=encoder, x=x, y=x + 0.3 * torch.randn_like(x), criterion=PairLoss(),
            lr=0.5, is_over_the_batch=True, bound=1e-5,
        ),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- measurement
def measure(s: Scenario) -> dict[str, float]:
    """Relative error of each loop's trained parameters."""
    exact = trained_parameters(whole_batch(s, torch.float64))
    errors: dict[str, float] = {}
    for name, loop in LOOPS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "gradaccum":  # no warning of ours goes unseen
                warnings.simplefilter("error", ga.GradAccumWarning)
            trained = trained_parameters(loop(s))
        errors[name] = float((trained - exact).norm() / exact.norm())
    return errors


def trained_parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| scenario | " + " | ".join(LOOPS) + " |", "| --- |" + " ---: |" * len(LOOPS)]
    for row in rows:
        cells = [cell(row, name) for name in LOOPS]
        lines.append(f"| {row['scenario']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any], name: str) -> str:
    error = row["errors"][name]
    text = f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"**{text}**" if name == "gradaccum" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "scenarios.json", help="where results go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"scenario": s.name, "bound": s.bound, "errors": measure(s)} for s in scenarios()]
    print(markdown(rows))
    write_results(arguments.json, {"unit": "relative error of the trained parameters", "scenarios": rows})
    broken = [row["scenario"] for row in rows if row["errors"]["gradaccum"] > row["bound"]]
    if broken:
        raise SystemExit(f"gradaccum is outside of its bound: {', '.join(broken)}")


if __name__ == "__main__":
    main()
