"""The language model: next-character prediction on the speeches of Tiny Shakespeare.

Speeches differ in length, so micro-batches differ in how many characters their mean is taken over, and a mean of means
is not the mean: here the textbook loop is wrong at every update, not only at the end of an epoch.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from gradaccum.cli.demo.task import Pair, Task

PADDING = 0  # both the input that means nothing and the target that is ignored

_MAX_CHARACTERS = 250  # longer speeches are cut: one of 1,763 characters would pad its whole batch to that, for seconds
_SEED = 0


def load_speeches(count: int) -> list[str]:
    """The first speeches of Tiny Shakespeare, each with its speaker's name."""
    text = (importlib.resources.files("gradaccum.cli.demo") / "data/speeches.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")[:count]


class Speeches(Dataset[Tensor]):
    """Speeches as 1-d tensors of character numbers, from 1 up; ``vocabulary`` counts the padding too."""

    def __init__(self, speeches: Sequence[str]) -> None:
        characters = sorted(set("".join(speeches)))
        numbers = {character: number for number, character in enumerate(characters, start=PADDING + 1)}
        self.vocabulary = len(characters) + 1
        self._speeches = [torch.tensor([numbers[c] for c in speech[:_MAX_CHARACTERS]]) for speech in speeches]

    def __len__(self) -> int:
        return len(self._speeches)

    def __getitem__(self, index: int) -> Tensor:
        return self._speeches[index]


def pad(speeches: list[Tensor]) -> Pair:
    """Inputs and targets ``[rows, longest - 1]``: each character, and the one that follows it."""
    padded = nn.utils.rnn.pad_sequence(speeches, batch_first=True, padding_value=PADDING)
    return padded[:, :-1], padded[:, 1:]


class CharacterModel(nn.Module):
    """A small causal convolution network: logits ``[rows, vocabulary, length]``, each from the last 9 characters."""

    def __init__(self, vocabulary: int, width: int = 32, kernel_size: int = 5) -> None:
        super().__init__()
        self.past = kernel_size - 1
        self.embedding = nn.Embedding(vocabulary, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, kernel_size) for _ in range(2))
        self.head = nn.Conv1d(width, vocabulary, 1)

    def forward(self, characters: Tensor) -> Tensor:
        """Character numbers ``[rows, length]`` to logits ``[rows, vocabulary, length]``."""
        hidden = self.embedding(characters).transpose(1, 2)
        for convolution in self.convolutions:
            padded = F.pad(hidden, (self.past, 0))  # only on the left: nothing sees what follows
            hidden = hidden + F.gelu(convolution(padded))
        return self.head(hidden)


def speeches_task(*, title: str, text: str, num_speeches: int = 340) -> Task:
    """A character model trained on the first speeches, mean over characters, padding ignored."""
    dataset = Speeches(load_speeches(num_speeches))

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(_SEED)
            return CharacterModel(dataset.vocabulary)

    return Task(
        title=title,
        text=text,
        unit="characters",
        model=model,
        dataset=dataset,
        collate=pad,
        criterion=nn.CrossEntropyLoss(ignore_index=PADDING),
        count=lambda target: int((target != PADDING).sum()),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        batch_size=32,
        micro_batch_size=8,
        epochs=3,
    )
