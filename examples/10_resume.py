"""A run that is stopped and goes on: with another micro-batch size, and with a torn checkpoint on the way.

`ga.Checkpoint` saves whole files or none, and notices when one has changed since. Positions are in samples and updates,
so the run goes on in the middle of an epoch, with the batches that were still to come.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
inputs = torch.randn(205, 16)
data = TensorDataset(inputs, inputs[:, :3].argmax(1))
UPDATES = 20  # an epoch has 7


def loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = micro_batch
    return F.cross_entropy(model(x), y)


def train(folder: Path, *, micro_batch_size: int, until: int = UPDATES) -> list[Tensor]:
    """Trains up to an update, from wherever the folder says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=UPDATES)
    train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=micro_batch_size, scheduler=scheduler)
    sampler = ga.GlobalBatchSampler(len(data), 32, seed=1)
    checkpoint = ga.Checkpoint(
        folder, model=model, optimizer=optimizer, scheduler=scheduler, train_step=train_step, sampler=sampler
    )
    found = checkpoint.load()
    print(f"{'starts' if found is None else 'goes on'} after update {train_step.updates}, in epoch {sampler.epoch}")
    loader = DataLoader(data, batch_sampler=sampler)
    while train_step.updates < until:
        for batch in loader:  # what is left of the epoch
            train_step(batch)
            checkpoint.save()
            if train_step.updates == until:
                break
    return list(model.parameters())


with tempfile.TemporaryDirectory() as name:
    whole = train(Path(name) / "whole", micro_batch_size=8)

    stopped = Path(name) / "stopped"
    train(stopped, micro_batch_size=8, until=4)
    train(stopped, micro_batch_size=13, until=11)  # on another machine, with room for more
    newest = max(stopped.iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])  # the power fails: update 11 is lost, update 10 is not
    resumed = train(stopped, micro_batch_size=5)

for ours, theirs in zip(resumed, whole, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
print("equal to the run that was never stopped to 1e-9")
