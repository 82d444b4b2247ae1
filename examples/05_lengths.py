"""Samples of different length: micro-batches of speeches of like length, and what that saves.

A batch padded to its longest speech mostly computes padding. `split_by_cost` packs speeches of like length together and
trims the padding they share. The loss is a mean over characters, so the gradient is the whole batch's all the same.
"""

import copy
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import gradaccum as ga

PADDING = 0
MAX_CHARACTERS = 4 * 299  # rows times the longest of one micro-batch: as many as in 4 of the longest speeches

Batch = dict[str, Tensor]


class CharacterModel(nn.Module):
    """Counts the characters that each forward runs, padding included."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16, padding_idx=PADDING)
        self.recurrent = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, vocabulary)
        self.num_run = 0

    def forward(self, characters: Tensor) -> Tensor:
        self.num_run += characters.numel()
        hidden, _ = self.recurrent(self.embedding(characters))
        return self.head(hidden).transpose(1, 2)  # [rows, vocabulary, length]


def num_characters(batch: Batch) -> Tensor:
    return (batch["targets"] != PADDING).sum(dim=1)


def loss_fn(model: CharacterModel, batch: Batch) -> ga.Loss:
    return criterion(model(batch["inputs"]), batch["targets"])


torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # a model this small gains nothing from more
torch.manual_seed(0)
texts = (Path(__file__).parent / "data" / "speeches.txt").read_text(encoding="utf-8").strip().split("\n\n")
numbers = {character: i for i, character in enumerate(sorted(set("".join(texts))), start=1)}
speeches = [torch.tensor([numbers[character] for character in text[:300]]) for text in texts]
padded = nn.utils.rnn.pad_sequence(speeches, batch_first=True, padding_value=PADDING)
batch = {"inputs": padded[:, :-1], "targets": padded[:, 1:]}  # each character, and the one that follows it

model = CharacterModel(len(numbers) + 1)
lengths_model, whole_batch_model = copy.deepcopy(model), copy.deepcopy(model)
criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=PADDING))
num_real = int(num_characters(batch).sum())

# Before: micro-batches of 4 speeches in the order they come, padded like the whole batch.
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4)
start = time.perf_counter()
train_step(batch)
before = time.perf_counter() - start

# After: speeches of like length, on the same memory.
optimizer = torch.optim.SGD(lengths_model.parameters(), lr=0.5)
by_length = ga.split_by_cost(num_characters, MAX_CHARACTERS)
train_step = ga.TrainStep(lengths_model, optimizer, loss_fn, split=by_length)
start = time.perf_counter()
update = train_step(batch)
after = time.perf_counter() - start

print(f"before: {model.num_run / num_real:.2f} characters run for each real one, {before:.2f} s")
print(f"after:  {lengths_model.num_run / num_real:.2f} characters run for each real one, {after:.2f} s")
print(f"loss {float(update.loss):.4f} over {int(update.weight)} characters, {update.micro_batches} micro-batches")

# The same on the whole batch, in plain torch.
optimizer = torch.optim.SGD(whole_batch_model.parameters(), lr=0.5)
nn.functional.cross_entropy(whole_batch_model(batch["inputs"]), batch["targets"], ignore_index=PADDING).backward()
optimizer.step()

exact = nn.utils.parameters_to_vector(whole_batch_model.parameters()).detach()
for trained in (model, lengths_model):
    ours = nn.utils.parameters_to_vector(trained.parameters()).detach()
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
assert lengths_model.num_run < 0.5 * model.num_run
print("both equal the whole batch to 1e-12")
