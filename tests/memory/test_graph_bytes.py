"""Bytes that a graph keeps, against what is known of the operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradaccum.memory.graph_bytes import graph_bytes


def test_each_storage_counts_once_and_what_is_there_anyway_not_at_all() -> None:
    x = torch.randn(3, 5)
    layer = nn.Linear(5, 7)
    with graph_bytes([*layer.parameters(), x]) as saved:
        y = layer(x).sigmoid()
        z = y * y  # keeps y twice, which the sigmoid has kept already
    assert saved.count == 3 * 7 * 4
    z.sum().backward()
    assert layer.weight.grad is not None


def test_without_a_graph_nothing_is_kept() -> None:
    with torch.no_grad(), graph_bytes([]) as saved:
        nn.Linear(5, 7)(torch.randn(3, 5)).sigmoid()
    assert saved.count == 0


def test_a_checkpoint_keeps_its_input_only() -> None:
    layer = nn.Sequential(nn.Linear(5, 500), nn.Tanh(), nn.Linear(500, 5))
    x = torch.randn(3, 5, requires_grad=True)
    with graph_bytes(layer.parameters()) as saved:
        y = checkpoint(layer, x, use_reentrant=False)
    assert saved.count <= 3 * 5 * 4
    y.sum().backward()


def test_views_count_their_whole_storage() -> None:
    x = torch.randn(100, requires_grad=True)
    with graph_bytes([]) as saved:
        (x.exp()[:10] ** 2).sum()
    assert saved.count == 100 * 4
