"""Models as they are wrapped for several processes, one that does not use all of itself, and each process's data."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tasks import Batch, joined, make_batch

# Rows of each micro-batch, by rank; a window is two of them.
PASSES: dict[str, list[list[int]]] = {
    "even": [[3, 3, 3, 3], [3, 3, 3, 3]],
    "uneven sizes": [[5, 1, 2, 4], [1, 1, 7, 2]],
    "a short tail on one": [[3, 2, 4], [3, 1, 2, 2]],
    "fewer windows on one": [[2], [3, 1, 2, 2, 5]],
}
WINDOW = 2


def windows(rows: list[list[int]]) -> tuple[list[list[Batch]], list[Batch]]:
    """Each rank's micro-batches, and the whole batches they add up to."""
    streams = [
        [make_batch(count, seed=100 * rank + i) for i, count in enumerate(counts)] for rank, counts in enumerate(rows)
    ]
    updates = max(-(-len(stream) // WINDOW) for stream in streams)
    whole = [joined([b for s in streams for b in s[i * WINDOW : (i + 1) * WINDOW]]) for i in range(updates)]
    return streams, whole


class Branches(nn.Module):
    """Uses a layer only where a row asks for it, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 3)
        self.sometimes = nn.Linear(4, 3)
        self.never = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        asks = batch["x"][:, 0, 0] > 1.0
        output = self.always(batch["x"])
        if bool(asks.any()):
            output = output + asks[:, None, None] * self.sometimes(batch["x"])
        return output


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "plain":
        return model
    options: dict[str, Any] = {
        "DDP": {},
        "DDP, unused": {"find_unused_parameters": True},
        "DDP, static": {"static_graph": True},
        "DDP, views": {"gradient_as_bucket_view": True},
    }[how]
    return DistributedDataParallel(model, **options)


def sharded(model: nn.Module, world_size: int, *, replicas: int = 1) -> nn.Module:
    """FSDP2 over all ranks, its blocks one by one if it has any; HSDP with several replicas."""
    mesh = (
        init_device_mesh("cpu", (world_size,))
        if replicas == 1
        else init_device_mesh("cpu", (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))
    )
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_tensor(tensor: Any) -> Any:
    """A parameter or gradient, put together from its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
