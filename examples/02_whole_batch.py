"""The whole batch in hand: `ga.TrainStep` cuts it, runs it piece by piece, and updates once.

The loader yields batches of the size you want to train with; how much of one fits in memory is one number, and changes
nothing but memory and time. Everything else of a real run is there too: a nested batch, class weights, AdamW, clipping,
a schedule.
"""

import copy

import torch
from torch import Tensor, nn

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
inputs = torch.randn(1_000, 16)
labels = inputs[:, :3].argmax(dim=1)
batches = [
    {"inputs": x, "labels": y} for x, y in zip(inputs.split(64), labels.split(64), strict=True)
]  # 15 of 64 samples, one of 40
criterion = ga.criterion(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.1))


def loss_fn(model: nn.Module, micro_batch: dict[str, Tensor]) -> ga.Loss:
    return criterion(model(micro_batch["inputs"]), micro_batch["labels"])


model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3))
whole_batch_model = copy.deepcopy(model)

# Accumulation: no forward sees more than 13 samples.
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=13, clip_norm=0.5, scheduler=scheduler)
for batch in batches:
    update = train_step(batch)
    print(
        f"update {update.index:2}: loss {float(update.loss):.4f}, gradient norm {update.as_dict()['grad_norm']:.3f}, "
        f"{update.samples} samples in {update.micro_batches} micro-batches"
    )

# The same on whole batches, in plain torch.
optimizer = torch.optim.AdamW(whole_batch_model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
for batch in batches:
    optimizer.zero_grad()
    loss_fn(whole_batch_model, batch).value.backward()
    nn.utils.clip_grad_norm_(whole_batch_model.parameters(), 0.5)
    optimizer.step()
    scheduler.step()

for ours, theirs in zip(model.parameters(), whole_batch_model.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
print("equal to the whole batch to 1e-12")
