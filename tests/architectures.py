"""Small models of the kinds that people train, each with a batch and a loss, for tests of what memory they take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import gradaccum as ga

CLASSES, WORDS, TIME = 10, 64, 16


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """``make()`` gives the model, ``batch(rows)`` what it is trained with."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss_fn: Callable[[Any, Any], Tensor]


class OverTime(nn.Module):
    """What a recurrent layer or an encoder makes of a sequence, reduced to classes."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.mean(1))


class Block(nn.Module):
    """A layer of a GPT, with dropout in its attention."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, time, width = x.shape
        parts = self.attention(self.norm(x)).view(rows, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(rows, time, width))
        return x + F.dropout(self.down(F.gelu(self.up(self.other_norm(x)))), self.dropout, self.training)


class Gpt(nn.Module):
    def __init__(self, *, width: int = 32, heads: int = 2, layers: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(TIME, width))
        self.blocks = nn.ModuleList([Block(width, heads, dropout=dropout) for _ in range(layers)])
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight  # tied

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def classes_loss(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def next_word_loss(model: Any, batch: Any) -> Tensor:
    ids = batch["ids"]
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _classes(*shape: int) -> Callable[[int], Any]:
    return lambda rows: (torch.randn(rows, *shape), torch.randint(0, CLASSES, (rows,)))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 4 * 4, CLASSES),
    )  # fmt: skip


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return OverTime(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), 16)


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(make=_mlp, batch=_classes(32), loss_fn=classes_loss),
    "convolutions": Architecture(make=_convolutions, batch=_classes(3, 16, 16), loss_fn=classes_loss),
    "encoder": Architecture(make=_encoder, batch=_classes(TIME, 16), loss_fn=classes_loss),
    "lstm": Architecture(
        make=lambda: OverTime(nn.LSTM(16, 24, 2, batch_first=True, dropout=0.1), 24),
        batch=_classes(TIME, 16),
        loss_fn=classes_loss,
    ),
    "gpt": Architecture(
        make=Gpt, batch=lambda rows: {"ids": torch.randint(0, WORDS, (rows, TIME))}, loss_fn=next_word_loss
    ),
}

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}


def mlp() -> nn.Module:
    """The model that `planned` plans by default, for the batches of `rows_of_8`."""
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def rows_of_8(rows: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.randint(0, 10, (rows,))


def planned(model: Any = None, loss_fn: Any = classes_loss, data: Any = None, **options: Any) -> ga.Plan:
    """A plan of something small, unless it is said of what; within a GiB, with Adam."""
    model = mlp() if model is None else model
    options = {"optimizer": torch.optim.Adam(model.parameters()), "memory": "1GiB", **options}
    return ga.plan(model, loss_fn, rows_of_8() if data is None else data, **options)
