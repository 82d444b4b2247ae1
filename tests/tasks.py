"""Models and losses for the oracle: small, of every kind that adds up in a way of its own, and all of one shape.

Each model maps a batch to ``[rows, TIME, CLASSES]``, so that every loss goes with every model. Each loss is written
twice: as a user returns it for a micro-batch, and as plain torch computes it for the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

TIME, FEATURES, CLASSES, WORDS = 4, 4, 3, 7
IGNORED = -100
CLASS_WEIGHTS = torch.tensor([0.25, 2.0, 0.0], dtype=torch.float64)
LABEL_SMOOTHING = 0.1

Batch = dict[str, Tensor]


def make_batch(rows: int, *, seed: int = 0, masked: bool = False) -> Batch:
    """``rows`` sequences of 1 to TIME tokens. With ``masked``, no label of theirs counts."""
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TIME + 1, (rows, 1), generator=made)
    counts = torch.arange(TIME) < (0 if masked else lengths)
    labels = torch.randint(0, CLASSES, (rows, TIME), generator=made)
    return {
        "x": torch.randn(rows, TIME, FEATURES, generator=made, dtype=torch.float64),
        "ids": torch.randint(0, WORDS, (rows, TIME), generator=made),
        "y": torch.randn(rows, TIME, CLASSES, generator=made, dtype=torch.float64),
        "mask": counts.expand(rows, TIME).contiguous(),
        "labels": labels.masked_fill(~counts, IGNORED),
    }


def joined(batches: list[Batch]) -> Batch:
    """The rows of all of them, in order."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def pieces(batch: Batch, sizes: list[int]) -> list[Batch]:
    """Consecutive rows of a batch."""
    cut = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: values[i] for name, values in cut.items()} for i in range(len(sizes))]


class Model(nn.Module):
    """Layers that read one entry of the batch."""

    def __init__(self, key: str, *layers: nn.Module) -> None:
        super().__init__()
        self.key = key
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: Batch) -> Tensor:
        hidden = batch[self.key]
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # recurrent layers return their state as well
        return hidden


class CumulativeSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class OverTime(nn.Module):
    """A convolution, for which time stands last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


def _embedding(*, sparse: bool = False) -> nn.Module:
    return Model("ids", nn.Embedding(WORDS, FEATURES, sparse=sparse), CumulativeSum(), nn.Linear(FEATURES, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Model("x", nn.Linear(FEATURES, CLASSES)),
    "mlp": lambda: Model("x", nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
    "embedding": _embedding,
    "sparse embedding": lambda: _embedding(sparse=True),
    "conv": lambda: Model("x", OverTime(nn.Conv1d(FEATURES, CLASSES, 3, padding=1))),
    "lstm": lambda: Model("x", nn.LSTM(FEATURES, CLASSES, batch_first=True)),
    "gru": lambda: Model("x", nn.GRU(FEATURES, 3, batch_first=True), nn.Linear(3, CLASSES)),
    "attention": lambda: Model(
        "x", nn.TransformerEncoderLayer(FEATURES, 2, 6, dropout=0.0, batch_first=True), nn.Linear(FEATURES, CLASSES)
    ),
    "layer norm": lambda: Model("x", nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES)),
}


def make_model(name: str, *, seed: int = 0) -> nn.Module:
    """A model in float64 with weights of its own for each seed."""
    torch.manual_seed(seed)
    return MODELS[name]().double()


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """One loss, written twice.

    Attributes:
        returned: from a micro-batch's output: what a user hands to the library.
        whole: from the whole batch's output: the loss to be trained with, by plain torch.
        weight: what the mean over the whole batch is taken over; None for sums, by name for terms.
        weights: the option ``weights=``, where the loss needs it.
    """

    returned: Callable[[Tensor, Batch], Any]
    whole: Callable[[Tensor, Batch], Tensor]
    weight: Callable[[Batch], float | dict[str, float] | None]
    weights: Callable[[Batch], Any] | None = None

    def for_library(self, model: nn.Module, batch: Batch) -> Any:
        return self.returned(model(batch), batch)

    def for_oracle(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.whole(model(batch), batch)


def _rows(batch: Batch) -> int:
    return len(batch["x"])


def _tokens(batch: Batch) -> int:
    return int(batch["mask"].sum())


def _squares(output: Tensor, batch: Batch) -> Tensor:
    """The squared error of each token that counts; 0 for the others."""
    return ((output - batch["y"]) ** 2).mean(-1) * batch["mask"]


def _token_mean(output: Tensor, batch: Batch) -> Tensor:
    return _squares(output, batch).sum() / batch["mask"].sum()


def _mse(output: Tensor, batch: Batch) -> Tensor:
    return F.mse_loss(output, batch["y"])


def _size(output: Tensor) -> Tensor:
    return (output**2).mean()


def _cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), batch["labels"])


def _weighted_cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), batch["labels"], weight=CLASS_WEIGHTS.to(output))


def _smoothed_cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(
        output.transpose(1, 2), batch["labels"], weight=CLASS_WEIGHTS.to(output), label_smoothing=LABEL_SMOOTHING
    )


def _class_weight(batch: Batch) -> float:
    return CLASS_WEIGHTS[batch["labels"][batch["mask"]].cpu()].sum().item()


def _two_means(output: Tensor, batch: Batch) -> Tensor:
    """Two terms' means; a term that has nothing to learn from adds nothing."""
    return (_cross_entropy(output, batch) if _tokens(batch) else 0.0) + _size(output)


_criterion = ga.criterion(nn.CrossEntropyLoss())
_weighted_criterion = ga.criterion(F.cross_entropy)
_smoothed_criterion = ga.criterion(partial(F.cross_entropy, label_smoothing=LABEL_SMOOTHING))
_sum_criterion = ga.criterion(nn.MSELoss(reduction="sum"))

LOSSES: dict[str, LossCase] = {
    "plain mean": LossCase(returned=_mse, whole=_mse, weight=_rows),
    "mean over samples": LossCase(
        returned=lambda output, batch: ga.Loss.mean(_mse(output, batch), over=_rows(batch)), whole=_mse, weight=_rows
    ),
    "sum over elements": LossCase(
        returned=lambda output, batch: ga.Loss.sum(((output - batch["y"]) ** 2).sum(), over=batch["y"].numel()),
        whole=_mse,
        weight=lambda batch: batch["y"].numel(),
    ),
    "mean over tokens": LossCase(
        returned=lambda output, batch: ga.Loss.mean(_token_mean(output, batch), over=batch["mask"].sum()),
        whole=_token_mean,
        weight=_tokens,
    ),
    "sum over tokens": LossCase(
        returned=lambda output, batch: ga.Loss.sum(_squares(output, batch).sum(), over=_tokens(batch)),
        whole=_token_mean,
        weight=_tokens,
    ),
    "ignored labels": LossCase(
        returned=lambda output, batch: _criterion(output.transpose(1, 2), batch["labels"]),
        whole=_cross_entropy,
        weight=_tokens,
    ),
    "class weights": LossCase(
        returned=lambda output, batch: _weighted_criterion(
            output.transpose(1, 2), batch["labels"], weight=CLASS_WEIGHTS.to(output)
        ),
        whole=_weighted_cross_entropy,
        weight=_class_weight,
    ),
    # Targets of the class with weight 0 weigh nothing, and add to the loss all the same.
    "class weights, smoothed": LossCase(
        returned=lambda output, batch: _smoothed_criterion(
            output.transpose(1, 2), batch["labels"], weight=CLASS_WEIGHTS.to(output)
        ),
        whole=_smoothed_cross_entropy,
        weight=_class_weight,
    ),
    "plain sum": LossCase(
        returned=lambda output, batch: ga.Loss.sum(_squares(output, batch).sum()),
        whole=lambda output, batch: _squares(output, batch).sum(),
        weight=lambda batch: None,
    ),
    "criterion of a sum": LossCase(
        returned=lambda output, batch: _sum_criterion(output, batch["y"]),
        whole=lambda output, batch: F.mse_loss(output, batch["y"], reduction="sum"),
        weight=lambda batch: None,
    ),
    "terms over the same": LossCase(
        returned=lambda output, batch: {"fit": _mse(output, batch), "size": _size(output)},
        whole=lambda output, batch: _mse(output, batch) + _size(output),
        weight=_rows,
    ),
    "terms of their own": LossCase(
        returned=lambda output, batch: {
            "fit": _criterion(output.transpose(1, 2), batch["labels"]),
            "size": ga.Loss.mean(_size(output), over=_rows(batch)),
        },
        whole=_two_means,
        weight=lambda batch: {"fit": _tokens(batch), "size": _rows(batch)},
        weights=lambda batch: {"fit": _tokens(batch), "size": _rows(batch)},
    ),
    "plain mean with its count": LossCase(
        returned=_token_mean, whole=_token_mean, weight=_tokens, weights=lambda batch: batch["mask"].sum()
    ),
}
