"""Two processes with unequal shares of batches that are no plain tensors: the whole batch's gradient on both."""

from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga
from layouts import LAYOUTS, Net, whole_gradient
from ranks import results_of

NAMES = ["image patches", "pairs", "packed text", "detection", "graphs"]


def case(rank: int, world_size: int, names: list[str]) -> dict[str, tuple[float, float, int | None]]:
    found: dict[str, tuple[float, float, int | None]] = {}
    for name in names:
        torch.manual_seed(1)
        layout, model = LAYOUTS[name], Net()
        batch, split = layout.make(), layout.split()
        right = whole_gradient(layout, model, batch)
        rows = split.rows(batch)
        pieces = split.plan(batch, split.largest(batch), max_rows=layout.together * -(-rows // layout.together // 2))
        share = split.cut(batch, pieces[rank])  # 4 and 3 samples of 7
        wrapped = nn.parallel.DistributedDataParallel(model)
        grads: list[torch.Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_, m=model, g=grads: g.append(torch.cat([p.grad.flatten() for p in m.parameters()]))  # type: ignore[union-attr]
        )

        def loss_fn(model: Any, micro_batch: Any, layout: Any = layout) -> Any:
            return layout.loss_fn(model.module, micro_batch)

        for size in (2, "auto"):
            step = ga.TrainStep(wrapped, optimizer, loss_fn, micro_batch_size=size, split=layout.split())  # type: ignore[arg-type]
            update = step(share)
        off = [float((gradient - right).norm() / right.norm()) for gradient in grads]
        found[name] = max(off), float(len(grads)), update.samples
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return results_of(case, 2, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_whole_batchs(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        off, updates, samples = result[name]
        assert off < 1e-12
        assert (updates, samples) == (2, LAYOUTS[name].together * 7)
