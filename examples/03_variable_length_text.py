"""Text of variable length: a language model whose loss is a mean over characters.

Speeches are padded to the longest of their micro-batch, and padding is ignored by the loss. So every micro-batch has
its own number of characters, and the mean of their means is not the batch's mean. `ga.criterion` returns the mean
together with what it was taken over.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradaccum as ga

PADDING = 0


class CharacterModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16, padding_idx=PADDING)
        self.recurrent = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(characters))
        return self.head(hidden).transpose(1, 2)  # [rows, vocabulary, length]


def pad(speeches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets: each character, and the one that follows it."""
    padded = nn.utils.rnn.pad_sequence(speeches, batch_first=True, padding_value=PADDING)
    return padded[:, :-1], padded[:, 1:]


torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
texts = (Path(__file__).parent / "data" / "speeches.txt").read_text(encoding="utf-8").strip().split("\n\n")
numbers = {character: i for i, character in enumerate(sorted(set("".join(texts))), start=1)}
# Any: DataLoader takes lists, and its annotation does not say so.
speeches: Any = [torch.tensor([numbers[character] for character in text]) for text in texts]

model = CharacterModel(len(numbers) + 1)
whole_batch_model, textbook_model = copy.deepcopy(model), copy.deepcopy(model)
cross_entropy = nn.CrossEntropyLoss(ignore_index=PADDING)

# Accumulation: batches of 16 speeches from micro-batches of 4.
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
criterion = ga.criterion(cross_entropy)
accumulator = ga.Accumulator(model, optimizer, batch_size=16)
for x, y in accumulator.over(DataLoader(speeches, batch_size=4, collate_fn=pad)):
    update = accumulator.backward(criterion(model(x), y))
    if update:
        print(f"update {update.index}: loss {float(update.loss):.4f} over {int(update.weight)} characters")

# The same on whole batches, in plain torch.
optimizer = torch.optim.SGD(whole_batch_model.parameters(), lr=0.5)
for x, y in DataLoader(speeches, batch_size=16, collate_fn=pad):
    optimizer.zero_grad()
    cross_entropy(whole_batch_model(x), y).backward()
    optimizer.step()

# And by the textbook loop, to see what it is that does not happen here.
optimizer = torch.optim.SGD(textbook_model.parameters(), lr=0.5)
for i, (x, y) in enumerate(DataLoader(speeches, batch_size=4, collate_fn=pad)):
    (cross_entropy(textbook_model(x), y) / 4).backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()

exact, ours, textbook = (
    nn.utils.parameters_to_vector(m.parameters()).detach() for m in (whole_batch_model, model, textbook_model)
)
print(f"textbook loop: {float((textbook - exact).norm() / exact.norm()):.0e} off the whole batch after 4 updates")
torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
print("gradaccum: equal to the whole batch to 1e-12")
