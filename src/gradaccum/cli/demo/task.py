"""What is trained on what: everything that does not depend on how a batch is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, default_collate

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, its data and how it is to be trained.

    Attributes:
        title: a heading.
        text: what it is, in a sentence or two.
        unit: what the loss is a mean over, in the plural.
        model: makes the untrained model in float32; the same each time.
        dataset: samples in the order they are used.
        collate: samples to a batch ``(x, y)``.
        criterion: a loss of `torch.nn`, called as ``criterion(model(x), y)``.
        count: how many units a target ``y`` has.
        optimizer: makes the optimizer of some parameters.
        batch_size: samples an update is made from.
        micro_batch_size: samples in one forward and backward of the ways that accumulate; divides ``batch_size``.
        epochs: passes over the data.
    """

    title: str
    text: str
    unit: str
    model: Callable[[], nn.Module]
    dataset: Dataset[Any]
    criterion: nn.Module
    count: Callable[[Tensor], int]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int
    micro_batch_size: int
    epochs: int
    collate: Callable[[list[Any]], Pair] = default_collate

    @property
    def num_samples(self) -> int:
        """Of the data."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    @property
    def updates_per_epoch(self) -> int:
        """The last of them may be of a smaller batch."""
        return -(-self.num_samples // self.batch_size)

    @property
    def updates(self) -> int:
        """In all epochs."""
        return self.epochs * self.updates_per_epoch

    @property
    def micro_batches(self) -> int:
        """How many make up a full batch."""
        return self.batch_size // self.micro_batch_size

    def loader(self, batch_size: int, dtype: torch.dtype) -> DataLoader[Pair]:
        """The data in order, in batches of ``batch_size``, whatever is a real number as ``dtype``."""

        def collate(samples: list[Any]) -> Pair:
            x, y = self.collate(samples)
            return _as_dtype(x, dtype), _as_dtype(y, dtype)

        return DataLoader(self.dataset, batch_size=batch_size, collate_fn=collate)


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
