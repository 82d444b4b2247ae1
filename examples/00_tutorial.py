"""The tutorial by which gradient accumulation is usually shown to work: its two loops, and the same with this library.

A linear regression, SGD without shuffling: batches of 40, against 10 x 4 with `loss / accum_iter`. With 1,000 samples
all epoch losses are equal. With 957 an epoch ends with 10 + 10 + 10 + 7 samples, and on text each micro-batch has its
own number of characters: there the textbook loop drifts away, and nothing says so.

Losses are printed as the tutorial prints them: batch means added up and divided by the number of samples. It has
0.54340577, 0.19144142, 0.06752514, from data of another seed, which it does not give.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

# Samples are (inputs, targets) with a row for each token: one row in the regression, one a character in the text. The
# text's model is a table of which character follows which.
x = torch.randn(1_000, 2, dtype=torch.float32)
y = x @ torch.tensor([[-2.0], [3.4]], dtype=torch.float32) + 4.2 + 0.01 * torch.randn(1_000, 1, dtype=torch.float32)
samples = list(zip(x.double().split(1), y.double().split(1), strict=True))

texts = (Path(__file__).parent / "data" / "speeches.txt").read_text(encoding="utf-8").strip().split("\n\n")
characters = sorted(set("".join(texts)))
encoded = [torch.tensor([characters.index(character) for character in text]) for text in texts]
speeches = [(speech[:-1], speech[1:]) for speech in encoded]

experiments: list[Any] = [  # Any: DataLoader takes lists, and its annotation does not say so
    ("1,000 samples", samples, nn.Linear(2, 1), nn.MSELoss(), 40, 0.01),
    ("957 samples", samples[:957], nn.Linear(2, 1), nn.MSELoss(), 40, 0.01),
    ("64 speeches", speeches, nn.Embedding(len(characters), len(characters)), nn.CrossEntropyLoss(), 16, 5.0),
]
accum_iter = 4


def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batch]), torch.cat([y for _, y in batch])


for title, data, model, criterion, batch_size, learning_rate in experiments:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    whole_batch_model, textbook_model = copy.deepcopy(model), copy.deepcopy(model)
    batches = DataLoader(data, batch_size, collate_fn=collate)
    micro_batches = DataLoader(data, batch_size // accum_iter, collate_fn=collate)

    # The ordinary loop.
    print(f"{title}, batches of {batch_size}:")
    optimizer = torch.optim.SGD(whole_batch_model.parameters(), lr=learning_rate)
    for epoch in range(3):
        epoch_loss = 0.0
        for x, y in batches:
            loss = criterion(whole_batch_model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            epoch_loss += loss.item()
        print(f"    epoch {epoch + 1}, loss {epoch_loss / len(data):.8f}")

    # The tutorial's loop.
    print(f"{title}, {batch_size // accum_iter} x {accum_iter} by the textbook loop:")
    optimizer = torch.optim.SGD(textbook_model.parameters(), lr=learning_rate)
    for epoch in range(3):
        epoch_loss = 0.0
        for i, (x, y) in enumerate(micro_batches):
            loss = criterion(textbook_model(x), y) / accum_iter
            loss.backward()
            epoch_loss += loss.item()
            if (i + 1) % accum_iter == 0 or i + 1 == len(micro_batches):
                optimizer.step()
                optimizer.zero_grad()
        print(f"    epoch {epoch + 1}, loss {epoch_loss / len(data):.8f}")

    # This library's.
    print(f"{title}, {batch_size // accum_iter} x {accum_iter} by gradaccum:")
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=accum_iter)
    exact_criterion = ga.criterion(criterion)
    for epoch in range(3):
        epoch_loss = 0.0
        for x, y in accumulator.over(micro_batches):
            update = accumulator.backward(exact_criterion(model(x), y))
            if update:
                epoch_loss += float(update.loss)
        print(f"    epoch {epoch + 1}, loss {epoch_loss / len(data):.8f}")

    whole, textbook, ours = (
        nn.utils.parameters_to_vector(m.parameters()).detach() for m in (whole_batch_model, textbook_model, model)
    )
    print(f"    textbook loop: {float((textbook - whole).norm() / whole.norm()):.0e} off the whole batch")
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
    print("    gradaccum: equal to the whole batch to 1e-12\n")
