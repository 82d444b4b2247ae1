"""Random BatchNorm networks, shapes and sizes against the whole batch."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from normed import CLASSES, SIDE, assert_like_whole, make_batches

WIDTH = 4


class Random(nn.Module):
    """Layers drawn one by one: some residual, some used again, some between samples, some behind checkpoints."""

    def __init__(self, kinds: list[str], momentum: float | None, *, affine: bool, tracks: bool) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(WIDTH, momentum=momentum, affine=affine, track_running_stats=tracks) for _ in kinds
        )
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in kinds)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        for index, kind in enumerate(self.kinds):
            norm, conv = self.norms[index], self.convs[index]
            if kind == "plain":
                hidden = torch.tanh(norm(conv(hidden)))
            elif kind == "residual":
                hidden = hidden + norm(conv(F.relu(hidden)))
            elif kind == "twice":
                hidden = norm(torch.tanh(norm(conv(hidden))) + hidden)
            elif kind == "again":
                hidden = torch.sigmoid(self.norms[0](conv(hidden)))
            elif kind == "gather":
                hidden = hidden * ga.gather(hidden.mean((2, 3))).std(0, correction=0).view(1, -1, 1, 1).sigmoid()
            elif kind == "checkpoint":
                # Without a graph of its own in the oracle's buffers: torch would advance them twice.
                hidden = checkpoint(lambda h, conv=conv: torch.tanh(conv(h)), hidden, use_reentrant=False)
            elif kind == "evaluation":
                hidden = norm.eval()(conv(hidden)) if norm.track_running_stats else hidden
            elif kind == "no grad":
                with torch.no_grad():
                    scale = norm(conv(hidden)).abs().amax(0, keepdim=True)[:, :, :1, :1]
                hidden = hidden * ga.gather(scale).amax(0, keepdim=True).sigmoid()
        return self.head(hidden.mean((2, 3)))


KINDS = st.sampled_from(["plain", "residual", "twice", "again", "gather", "checkpoint", "evaluation", "no grad"])


@given(data=st.data())
def test_random_networks(data: Any) -> None:
    kinds = data.draw(st.lists(KINDS, min_size=1, max_size=4), label="kinds")
    rows = data.draw(st.integers(2, 11), label="rows")
    size = data.draw(st.integers(1, rows), label="micro_batch_size")
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    model = Random(
        kinds, data.draw(st.sampled_from([0.1, 0.7, None]), label="momentum"),
        affine=data.draw(st.booleans(), label="affine"), tracks=data.draw(st.booleans(), label="tracks"),
    ).double()  # fmt: skip
    batches = [(x[:, :, : SIDE - 2, : SIDE - 2], y) for x, y in make_batches(2, rows=rows)]
    # Three times what networks by name are held to: gradients of random ones may be small against their terms.
    assert_like_whole(model, batches, micro_batch_size=size, tolerance=3e-10)
