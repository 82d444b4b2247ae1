"""Several processes with FSDP2: parameters in parts, and still the whole batch's update.

    torchrun --nproc-per-node 2 examples/09_fsdp2.py

FSDP2 reduces in every backward, which holds gradients in parts too; `sync="last"` would reduce once an update and hold
them whole. Every forward waits for all processes, so one whose share makes fewer micro-batches runs fillers, which
change nothing. Runs on CPUs with gloo, and on GPUs with NCCL.
"""

import copy
import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gradaccum as ga

logging.basicConfig(format="%(message)s")
logging.getLogger("gradaccum").setLevel(logging.INFO)  # shows the plan line
dist.init_process_group()
rank, world_size = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss_fn(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = micro_batch
    return F.mse_loss(model(x), y)


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = Network().to(device)
whole_batch_model = copy.deepcopy(model)
mesh = init_device_mesh(device.type, (world_size,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
whole_batch_optimizer = torch.optim.AdamW(whole_batch_model.parameters(), lr=0.01)
train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, clip_norm=1.0)
for index in range(5):
    x = torch.randn(13 + index, 16).to(device)  # the global batch; every process knows it, and takes its rows
    y = x.sum(1, keepdim=True)
    own = slice(rank * len(x) // world_size, (rank + 1) * len(x) // world_size)
    update = train_step((x[own], y[own]))

    whole_batch_optimizer.zero_grad()
    loss_fn(whole_batch_model, (x, y)).backward()
    norm = nn.utils.clip_grad_norm_(whole_batch_model.parameters(), 1.0)
    whole_batch_optimizer.step()
    if rank == 0:
        print(
            f"update {update.index}: gradient norm {update.as_dict()['grad_norm']:.6f}, "
            f"of the whole batch {float(norm):.6f}"
        )

for ours, theirs in zip(model.parameters(), whole_batch_model.parameters(), strict=True):
    torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-9, atol=1e-11)  # type: ignore[attr-defined]
if rank == 0:
    print("equal to the whole batch to 1e-9")
dist.destroy_process_group()
