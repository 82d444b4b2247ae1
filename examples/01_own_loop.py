"""Your own loop: the loader yields micro-batches, `ga.Accumulator` makes the updates.

The textbook experiment with an awkward number of samples. 957 samples in micro-batches of 10 make 23 full batches of
40, and a last one of 10 + 10 + 10 + 7: a loop that divides by 4 gets every epoch's last update wrong, this one none.
"""

import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(957, 2)
y = x @ torch.tensor([[-2.0], [3.4]]) + 4.2 + 0.01 * torch.randn(957, 1)
data = TensorDataset(x, y)
criterion = nn.MSELoss()

model = nn.Linear(2, 1)
whole_batch_model = copy.deepcopy(model)

# Accumulation: batches of 40 from micro-batches of 10.
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
accumulator = ga.Accumulator(model, optimizer, batch_size=40)
for _ in range(3):
    for x, y in accumulator.over(DataLoader(data, batch_size=10)):
        update = accumulator.backward(criterion(model(x), y))
        if update and update.index % 8 == 0:
            print(f"update {update.index:2}: loss {float(update.loss):8.5f} over {update.samples} samples")

# The same on whole batches, in plain torch.
optimizer = torch.optim.SGD(whole_batch_model.parameters(), lr=0.01)
for _ in range(3):
    for x, y in DataLoader(data, batch_size=40):
        optimizer.zero_grad()
        criterion(whole_batch_model(x), y).backward()
        optimizer.step()

for ours, theirs in zip(model.parameters(), whole_batch_model.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
print("equal to the whole batch to 1e-12")
