"""Several processes with DistributedDataParallel: unequal shares, and still the whole batch's update.

    torchrun --nproc-per-node 2 examples/08_ddp.py

Nothing but the wrapping and the sampler differs from one process. Each global batch of 32 is cut into a share for each
process, here unequal ones, as for two GPUs of unequal speed. Gradients are reduced once an update, and divided by the
tokens of the whole batch. Runs on CPUs with gloo, and on GPUs with NCCL.
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

dist.init_process_group()
rank, world_size = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
inputs = torch.randn(200, 9, 16)
labels = inputs[..., :5].argmax(-1).masked_fill(torch.rand(200, 9) < torch.rand(200, 1), -100)  # unequal token counts
data = TensorDataset(inputs, labels)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5)).to(device)
whole_batch_model = copy.deepcopy(model)
criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=-100))


def loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> ga.Loss:
    x, y = micro_batch
    return criterion(model(x).transpose(1, 2), y)


wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
train_step = ga.TrainStep(wrapped, optimizer, loss_fn, micro_batch_size=4, clip_norm=1.0)
shares = [3.0, 1.0] + [1.0] * (world_size - 2)  # the first process takes three times as much
sampler = ga.GlobalBatchSampler(len(data), 32, proportions=shares[:world_size])
loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.collate(data))
for batch in loader:
    update = train_step(batch)
    if rank == 0:
        print(
            f"update {update.index}: loss {float(update.loss):.4f} over {int(update.weight)} tokens, "
            f"{update.samples} samples in {update.micro_batches} micro-batches on {world_size} processes"
        )

# The same on whole batches, by one process in plain torch.
optimizer = torch.optim.AdamW(whole_batch_model.parameters(), lr=0.01)
for rows in ga.GlobalBatchSampler(len(data), 32, rank=0, world_size=1):
    x, y = inputs[rows].to(device), labels[rows].to(device)
    optimizer.zero_grad()
    F.cross_entropy(whole_batch_model(x).transpose(1, 2), y, ignore_index=-100).backward()
    nn.utils.clip_grad_norm_(whole_batch_model.parameters(), 1.0)
    optimizer.step()

for ours, theirs in zip(model.parameters(), whole_batch_model.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
if rank == 0:
    print("equal to the whole batch to 1e-9")
dist.destroy_process_group()
