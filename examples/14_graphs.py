"""Graphs: the nodes of all graphs lie one after another, and edges are numbers of nodes of the whole batch.

A micro-batch has other numbers, so `axes=` is not enough: a `ga.Split` of one's own cuts between graphs and renumbers.
It is four methods, and everything takes it: `TrainStep`, "auto", `ga.plan`, processes. Here "auto" finds the size.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradaccum as ga

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

Graphs = dict[str, Tensor]  # x [nodes, features], edges [2, edges], graph [nodes], y [graphs]


class ByGraphs:
    unit = "graphs"  # what "auto" logs sizes in

    def rows(self, batch: Graphs) -> int:
        return len(batch["y"])

    def largest(self, batch: Graphs) -> int:
        return self.rows(batch)

    def plan(self, batch: Graphs, size: int, *, max_rows: int | None = None) -> Sequence[Tensor]:
        return torch.arange(self.rows(batch)).split(size if max_rows is None else min(size, max_rows))

    def cut(self, batch: Graphs, rows: Any) -> Graphs:
        is_taken = torch.isin(batch["graph"], rows)
        number = is_taken.cumsum(0) - 1
        return {
            "x": batch["x"][is_taken],
            "edges": number[batch["edges"][:, is_taken[batch["edges"][0]]]],
            "graph": torch.searchsorted(rows, batch["graph"][is_taken]),
            "y": batch["y"][rows],
        }


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, batch: Graphs) -> Tensor:
        source, target = batch["edges"]
        nodes = torch.zeros(len(batch["x"]), 8).index_add(0, target, self.message(batch["x"])[source]).tanh()
        return self.out(torch.zeros(len(batch["y"]), 8).index_add(0, batch["graph"], nodes)).squeeze(1)


def make_batch() -> Graphs:
    sizes = torch.randint(2, 9, (13,))
    first = sizes.cumsum(0) - sizes
    edges = [
        int(start) + torch.randint(int(size), (2, 2 * int(size))) for start, size in zip(first, sizes, strict=True)
    ]
    nodes = int(sizes.sum())
    return {
        "x": torch.randn(nodes, 4),
        "edges": torch.cat(edges, 1),
        "graph": torch.arange(13).repeat_interleave(sizes),
        "y": torch.randn(13),
    }


def loss_fn(model: nn.Module, batch: Graphs) -> Tensor:
    return (model(batch) - batch["y"]).square().mean()  # a mean over graphs, which are the samples


model = GraphNet()
batches = [make_batch() for _ in range(6)]

# The whole batch.
whole = copy.deepcopy(model)
optimizer = torch.optim.SGD(whole.parameters(), lr=0.02)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(whole, batch).backward()
    optimizer.step()

# Five graphs at most, and the size that fits.
for size in (5, "auto"):
    ours = copy.deepcopy(model)
    train_step = ga.TrainStep(
        ours, torch.optim.SGD(ours.parameters(), lr=0.02), loss_fn, micro_batch_size=size, split=ByGraphs()
    )
    for batch in batches:
        update = train_step(batch)
    print(f"{size}: {update.samples} graphs in {update.micro_batches} micro-batches, loss {float(update.loss):.5f}")
    for parameter, right in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, right, rtol=1e-12, atol=1e-14)
print("equal to the whole batch to 1e-12")
