"""Accelerate's documented loop as it is and made exact, side by side; and the accumulator on prepared objects."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

pytest.importorskip("accelerate")

import accelerate

from gradaccum.integrations import exact as exact_any
from gradaccum.integrations.accelerate import accumulator, exact
from ranks import results_of

ROWS, STEPS, PER_BATCH = 37, 4, 5
EXACT, WRONG = 1e-12, 1e-3


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 7, 5, generator=generator).double()
    labels = torch.randint(0, 3, (rows, 7), generator=generator)
    return x, labels.where(torch.arange(7) < torch.randint(1, 8, (rows, 1), generator=generator), -100)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten())


def by_whole_batches(rows: int, size: int) -> dict[str, Tensor]:
    model, (x, labels) = model_of(), data(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, rows, size):
        optimizer.zero_grad()
        loss_of(model, x[start : start + size], labels[start : start + size]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    return model.state_dict()


def far(state: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((state[name] - one).abs().max()) for name, one in expected.items())


def documented_loop(kind: str, rows: int = ROWS, **options: Any) -> tuple[dict[str, Tensor], list[float], Any]:
    """Word for word; only ``exact(accelerator)`` is added."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS, **options)
    if kind == "exact":
        exact(accelerator)
    elif kind == "exact, by type":
        exact_any(accelerator)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    loader = DataLoader(TensorDataset(*data(rows)), batch_size=PER_BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses: list[float] = []
    for x, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
                losses += [] if kind == "stock" else [accelerator.exact.loss.item()]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model).state_dict(), losses, accelerator


@pytest.mark.parametrize("kind", ["exact", "exact, by type"])
def test_the_documented_loop(kind: str) -> None:
    expected = by_whole_batches(ROWS, STEPS * PER_BATCH)
    assert far(documented_loop("stock")[0], expected) > WRONG
    state, losses, accelerator = documented_loop(kind)
    assert far(state, expected) < EXACT
    assert losses[0] == pytest.approx(loss_of(model_of(), *(part[:20] for part in data())).item(), abs=EXACT)
    accelerator.exact.undo()
    assert "backward" not in accelerator.__dict__
    assert not hasattr(accelerator, "exact")


def test_a_loss_that_says_what_it_is_over_and_one_that_does_not() -> None:
    accelerator = exact(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    model = accelerator.prepare(model_of())
    x = torch.randn(7, 5).double()
    with accelerator.accumulate(model):
        accelerator.backward(ga.Loss.mean(model(x[:5]).norm(dim=-1).mean(), over=5))
    with accelerator.accumulate(model):
        accelerator.backward(model(x[5:]).norm(dim=-1).mean(), over=2)
    made = copy.deepcopy(model[0].weight.grad)
    model.zero_grad()
    model(x).norm(dim=-1).mean().backward()
    torch.testing.assert_close(made, model[0].weight.grad, rtol=EXACT, atol=EXACT)
    model.zero_grad()
    with pytest.raises(ga.LossError, match="cannot be seen what this loss is a mean over"):
        accelerator.backward(model(x).norm())


def test_an_open_window_is_saved(tmp_path: Any) -> None:
    def train(*, stops: bool) -> Tensor:
        accelerator = exact(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
        model = accelerator.prepare(model_of())
        accelerator.register_for_checkpointing(accelerator.exact)
        x, labels = data()
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x[:5], labels[:5]))
        if stops:
            accelerator.save_state(str(tmp_path / "state"))
            model.zero_grad()
            accelerator.exact._window.discard()
            accelerator.load_state(str(tmp_path / "state"))
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x[5:8], labels[5:8]))
        return copy.deepcopy(model[0].weight.grad)

    assert torch.equal(train(stops=True), train(stops=False))


def test_accumulator_on_prepared_objects() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    loader = DataLoader(TensorDataset(*data()), batch_size=PER_BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    criterion = ga.criterion(nn.CrossEntropyLoss())
    made = accumulator(accelerator, model, optimizer, micro_batches=STEPS, clip_norm=0.3, scheduler=scheduler)
    for x, labels in made.over(loader):
        made.backward(criterion(model(x).flatten(0, 1), labels.flatten()))
    assert far(accelerator.unwrap_model(model).state_dict(), by_whole_batches(ROWS, STEPS * PER_BATCH)) < EXACT
    assert made.updates == 2


def test_a_skipped_step_is_told() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    made = accumulator(accelerator, model, optimizer, micro_batches=1)
    for number, x in enumerate(made.over([torch.full((3, 2), value) for value in (1.0, float("inf"), 1.0)])):
        update = made.backward(ga.Loss.mean(model(x).mean(), over=3))
        assert update is not None
        assert accelerator.optimizer_step_was_skipped == update.skipped == (number == 1)


def test_two_that_accumulate() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Linear(2, 1)
    with pytest.raises(ga.MisuseError, match=r"accumulates as well.* micro_batches=4"):
        accumulator(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=4)


def test_the_seam_for_its_backward() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)  # which its backward divides by
    model, (x, labels) = model_of(), data(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ga.TrainStep(
        model, optimizer, lambda m, b: ga.Loss.mean(loss_of(m, *b), over=(b[1] != -100).sum()), micro_batch_size=3,
        backward=accelerator.backward,
    )  # fmt: skip
    step.backward((x, labels))
    made = copy.deepcopy(model[0].weight.grad)  # type: ignore[index]
    model.zero_grad()
    loss_of(model, x, labels).backward()
    torch.testing.assert_close(made, model[0].weight.grad, rtol=EXACT, atol=EXACT)  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------- two processes
def on_a_rank(rank: int, world_size: int) -> dict[str, Any]:
    import os
    import warnings

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29572"}
    found: dict[str, Any] = {}
    for kind in ("stock", "exact"):
        found[kind] = documented_loop(kind, rows=40)[0]
        accelerate.state.AcceleratorState._reset_state()
        accelerate.state.GradientState._reset_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        documented_loop("exact", rows=33)
    found["warnings"] = [str(one.message) for one in caught if issubclass(one.category, ga.GradAccumWarning)]
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    model = model_of()
    loader = DataLoader(TensorDataset(*data(33)), batch_size=PER_BATCH)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    made = accumulator(accelerator, model, optimizer, micro_batches=2, clip_norm=0.3)
    criterion = ga.criterion(nn.CrossEntropyLoss())
    for x, labels in made.over(loader):
        made.backward(criterion(model(x).flatten(0, 1), labels.flatten()))
    found["accumulator"] = accelerator.unwrap_model(model).state_dict()
    return found


def test_two_processes() -> None:
    for found in results_of(on_a_rank, 2, seconds=250):
        expected = by_whole_batches(40, 2 * STEPS * PER_BATCH)
        assert far(found["exact"], expected) < EXACT
        assert far(found["stock"], expected) > WRONG
        assert any("Accelerate repeats rows" in text for text in found["warnings"])
        assert far(found["accumulator"], by_whole_batches(33, 2 * 2 * PER_BATCH)) < EXACT
