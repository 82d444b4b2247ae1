"""Transformers' Trainer on tiny models: what its optimizer is about to see, beside the whole batch in float64."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import transformers
from transformers import TrainerCallback, TrainingArguments

transformers.logging.set_verbosity_error()

ROWS, POSITIONS, WORDS, IGNORED = 19, 9, 29, -100
PER_DEVICE, STEPS = 2, 4
HAS_STRATEGY = hasattr(TrainingArguments, "train_sampling_strategy")  # of the sampler; older versions shuffle
SIZE = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SIZE, "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 16}  # fmt: skip
LLAMA = {**SIZE, "intermediate_size": 16, "num_key_value_heads": 2, "max_position_embeddings": 16}

Rows = list[dict[str, Any]]
Gradients = dict[str, Tensor]


def texts(labels: str = "words", number: int = ROWS, seed: int = 0) -> Rows:
    """Ragged rows with labels for each word, or of one kind for a row."""
    generator = torch.Generator().manual_seed(seed)
    rows: Rows = []
    for _ in range(number):
        length = int(torch.randint(2, POSITIONS + 1, (1,), generator=generator))
        mask = (torch.arange(POSITIONS) < length).long()
        words = torch.randint(4, WORDS, (POSITIONS,), generator=generator) * mask
        row: dict[str, Any] = {"input_ids": words, "attention_mask": mask}
        if labels == "words":
            row["labels"] = words.where(mask == 1, IGNORED)
        elif labels == "tags":
            row["labels"] = (words % 3).where(mask == 1, IGNORED)
        elif labels == "class":
            row["labels"] = words[0] % 3
        elif labels == "number":
            row["labels"] = words[0].float() / WORDS
        elif labels == "several":
            row["labels"] = torch.stack([(words[0] % k == 0).float() for k in (2, 3, 5)])
        rows.append(row)
    return rows


@dataclass
class Ran:
    """What a training saw: gradients at each update, logs, the order of callbacks, and the trainer."""

    gradients: list[Gradients] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    trainer: Any = None


class _Sees(TrainerCallback):
    def __init__(self, ran: Ran) -> None:
        self._ran = ran

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._ran.events.append("step_begin")

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._ran.events.append("substep_end")

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self._ran.events.append("pre_optimizer_step")
        parameters = getattr(model, "module", model).named_parameters()
        self._ran.gradients.append({n: p.grad.detach().double().clone() for n, p in parameters if p.grad is not None})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._ran.events.append("step_end")


def train(
    cls: Any,
    model: nn.Module,
    rows: Any,
    folder: Any,
    *,
    options: dict[str, Any] | None = None,
    wrap: Callable[[Any], Any] = lambda trainer: trainer,
    resume: Any = None,
    **arguments: Any,
) -> Ran:
    """Trains a copy of the model for an epoch of 2 x 4 rows an update, without moving it unless ``learning_rate=``."""
    ran = Ran()
    arguments = {
        "per_device_train_batch_size": PER_DEVICE,
        "gradient_accumulation_steps": STEPS,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"train_sampling_strategy": "sequential"} if HAS_STRATEGY else {}),
        **arguments,
    }
    args = TrainingArguments(output_dir=str(folder), **arguments)
    trainer = cls(model=copy.deepcopy(model), args=args, train_dataset=rows, callbacks=[_Sees(ran)], **(options or {}))
    if not HAS_STRATEGY:
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.remove_callback(transformers.PrinterCallback)
    ran.trainer = wrap(trainer)
    ran.trainer.train(resume_from_checkpoint=resume)
    ran.logs = [log for log in ran.trainer.state.log_history if "loss" in log]
    return ran


def collated(rows: Rows) -> dict[str, Tensor]:
    """One batch of rows."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def whole(
    model: nn.Module, rows: Rows, loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
) -> list[tuple[Gradients, float]]:
    """Gradient and loss of each whole batch, in float64, by the model's own loss."""
    model = copy.deepcopy(model).double().train()
    found: list[tuple[Gradients, float]] = []
    for start in range(0, len(rows), PER_DEVICE * STEPS):
        batch = collated(rows[start : start + PER_DEVICE * STEPS])
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        model.zero_grad()
        loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
        loss.backward()
        found.append(
            ({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss.detach().item())
        )
    return found


def error(made: Gradients, expected: Gradients) -> float:
    """How far a gradient is from another, relative to that one's norm."""
    difference = sum(float((made[name] - one).pow(2).sum()) if name in made else float(one.pow(2).sum())
                     for name, one in expected.items())  # fmt: skip
    return (difference / sum(float(one.pow(2).sum()) for one in expected.values())) ** 0.5


def errors(ran: Ran, expected: list[tuple[Gradients, float]]) -> list[float]:
    """The error of each update."""
    assert len(ran.gradients) == len(expected), f"{len(ran.gradients)} updates instead of {len(expected)}"
    return [error(made, right) for made, (right, _) in zip(ran.gradients, expected, strict=True)]


def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` with class weights, which ignores the number of items."""
    logits = outputs["logits"]
    return F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0, 0.2], dtype=logits.dtype))


def divided(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` that divides by the number of items, as the documentation has it."""
    logits = outputs["logits"].flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
