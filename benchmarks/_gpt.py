"""A GPT of any shape, with random words to train on; gpt.py measures it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _loops import Batch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large a GPT is; the table of words is also the last layer."""

    layers: int
    width: int
    heads: int
    words: int = 50_257
    context: int = 1024


SHAPES = {
    "tiny": Shape(layers=2, width=16, heads=2, words=61, context=32),
    "124M": Shape(layers=12, width=768, heads=12),  # GPT-2 small
    "1B": Shape(layers=18, width=2048, heads=16),
}


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, time, width = x.shape
        parts = self.attention(self.before_attention(x)).view(rows, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(rows, time, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(shape.words, shape.width), nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.words, bias=False)
        self.head.weight = self.words.weight
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    words, targets = batch
    return F.cross_entropy(model(words).flatten(0, 1), targets.flatten())


def make_batch(shape: Shape, rows: int, tokens: int) -> Batch:
    """Random words and targets ``[rows, tokens]``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(shape.words, (2, rows, tokens), generator=generator)
    return both[0], both[1]
