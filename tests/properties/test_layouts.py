"""Batches in the layouts that people have equal the whole batch: in one's own loop, by TrainStep, and as audit and plan
see them."""

import pytest
import torch
from torch import Tensor

import gradaccum as ga
from layouts import LAYOUTS, Net, taken_gradient, whole_gradient

# Nested tensors with strided layout warn of their being a prototype when the first one is made.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
EXACT = 1e-12
names = pytest.mark.parametrize("name", LAYOUTS)


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@names
@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_a_step_makes_the_whole_batchs_gradient(name: str, size: int) -> None:
    layout, model = LAYOUTS[name], Net()
    batch = layout.make()
    right = whole_gradient(layout, model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ga.TrainStep(model, optimizer, layout.loss_fn, micro_batch_size=size, split=layout.split())
    for _ in range(3):  # "auto" tries other sizes
        step.backward(batch)
        assert off(taken_gradient(model), right) < EXACT
    update = step(batch)
    assert update.samples == layout.split().rows(batch)
    if size != "auto":
        assert update.micro_batch_size == max(size // layout.together, 1) * layout.together


@names
def test_ones_own_loop(name: str) -> None:
    layout, model = LAYOUTS[name], Net()
    batch, split, seen = layout.make(), layout.split(), []
    right = whole_gradient(layout, model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])))  # type: ignore[union-attr]
    pieces = split.plan(batch, split.largest(batch), max_rows=3)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=len(pieces))
    for micro_batch in accumulator.over([split.cut(batch, piece) for piece in pieces]):
        update = accumulator.backward(layout.loss_fn(model, micro_batch))
    assert update is not None
    assert off(seen[0], right) < EXACT


@names
def test_a_plan_and_ready_micro_batches(name: str) -> None:
    layout, model = LAYOUTS[name], Net()
    batch, split = layout.make(), layout.split()
    plan = ga.plan(model, layout.loss_fn, batch, split=split, memory="1GiB", max_seconds=0.1)
    assert plan.micro_batch_size >= 1

    right = whole_gradient(layout, model, batch)
    ready = [split.cut(batch, piece) for piece in split.plan(batch, split.largest(batch), max_rows=3)]
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), layout.loss_fn, split=ga.split_as_given())
    step.backward(ready)
    assert off(taken_gradient(model), right) < EXACT


@names
def test_an_audit(name: str) -> None:
    layout = LAYOUTS[name]
    split = layout.split() if layout.needs_split else None
    report = ga.audit(Net(), layout.loss_fn, layout.make(), micro_batch_size=3, split=split)
    assert report.exact, report


@pytest.mark.parametrize(
    "name", [name for name, layout in LAYOUTS.items() if layout.needs_split and layout.together == 1]
)
def test_what_cannot_be_cut_at_index_0_is_refused(name: str) -> None:
    layout, model = LAYOUTS[name], Net()
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), layout.loss_fn, micro_batch_size=3)
    if name == "packed text":  # one row of a batch: a sample, which is not cut
        assert step(layout.make()).micro_batches == 1
        return
    with pytest.raises(ga.BatchError, match=r"Rows disagree.*ga\.split_by_samples\(axes="):
        step(layout.make())
