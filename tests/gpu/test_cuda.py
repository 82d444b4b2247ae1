"""On a GPU: the same exactness, the same random numbers, and no wait for the device inside a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import gradaccum as ga
from oracle import (
    RAGGED,
    ROWS,
    WAYS,
    assert_same,
    assert_same_gradients,
    assert_same_number,
    gradients_of,
    parameters_of,
    whole_batches,
    whole_in_hand,
)
from tasks import LOSSES, MODELS, Batch, make_batch, make_model, pieces

pytestmark = pytest.mark.gpu

EVERY_WAY = pytest.mark.parametrize("way", WAYS)
CUDA = "cuda"

# One rounding to bf16 is off by 2**-9, to fp16 by 2**-12; a gradient is rounded some ten times on its way back.
BF16 = 0.03
FP16 = 0.004

BATCHES = [make_batch(ROWS, seed=1), make_batch(ROWS, seed=2)]


def on_gpu(batch: Batch, dtype: torch.dtype = torch.float64) -> Batch:
    return {name: value.to(CUDA, dtype if value.is_floating_point() else None) for name, value in batch.items()}


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch), batch["y"])


@contextmanager
def no_waiting() -> Iterator[None]:
    """Every synchronisation of host and device is an error."""
    torch.cuda.synchronize()
    try:
        with catch_warnings():
            simplefilter("ignore")  # it is a prototype, and says so
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(made: dict[str, Any], expected: dict[str, Any]) -> float:
    flat = [torch.cat([value.double().cpu().flatten() for value in side.values()]) for side in (made, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


# ------------------------------------------------------------------------------------------------------------ exactness


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "large sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-2, fused=True),
    "capturable adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-2, capturable=True),
}


def assert_like_whole(
    way: str, model: str, loss: Any, whole_loss: Any, optimizer: str, *, clip_norm: float | None = None, **options: Any
) -> None:
    """Two updates by the library are those of plain torch on whole batches."""
    own, whole = make_model(model).to(CUDA), make_model(model).to(CUDA)
    batches, make = [on_gpu(batch) for batch in BATCHES], OPTIMIZERS[optimizer]
    made = WAYS[way](own, make(own.parameters()), batches, loss, clip_norm=clip_norm, **options)
    assert_same(made, whole_batches(whole, make(whole.parameters()), batches, whole_loss, clip_norm=clip_norm))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
@EVERY_WAY
def test_every_model_and_loss(way: str, model: str, loss: str) -> None:
    case = LOSSES[loss]
    assert_like_whole(way, model, case.for_library, case.for_oracle, "sgd", weights=case.weights)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("loss", ["plain mean", "ignored labels"])
@pytest.mark.parametrize("name", ["fused sgd", "fused adamw", "capturable adamw"])
@EVERY_WAY
def test_every_optimizer(way: str, name: str, loss: str, clip_norm: float | None) -> None:
    case = LOSSES[loss]
    assert_like_whole(way, "mlp", case.for_library, case.for_oracle, name, clip_norm=clip_norm)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@EVERY_WAY
def test_criterion_with_weights_that_stay_on_the_device(way: str, clip_norm: float | None) -> None:
    weight = torch.tensor([0.25, 2.0, 1.0], dtype=torch.float64, device=CUDA)
    criterion = ga.criterion(nn.CrossEntropyLoss(weight))

    def loss(model: nn.Module, batch: Batch) -> ga.Loss:
        return criterion(model(batch).transpose(1, 2), batch["labels"])

    def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch).transpose(1, 2), batch["labels"], weight=weight)

    assert_like_whole(way, "mlp", loss, whole_loss, "large sgd", clip_norm=clip_norm)


# ----------------------------------------------------------------------------------------- batches that lie on the host
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 4, ROWS])
def test_a_batch_on_the_host_is_moved_piece_by_piece(micro_batch_size: int, pinned: bool) -> None:
    own, whole = make_model("mlp").to(CUDA), make_model("mlp").to(CUDA)
    batches = [{name: value.pin_memory() if pinned else value for name, value in batch.items()} for batch in BATCHES]
    before = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    seen: list[tuple[torch.device, int]] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        seen.append((batch["x"].device, len(batch["x"])))
        return mse(model, batch)

    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    train_step = ga.TrainStep(own, optimizer, loss_fn, micro_batch_size=micro_batch_size)
    made, _ = whole_in_hand(train_step, own, optimizer, batches)

    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    assert_same(made, whole_batches(whole, optimizer, [on_gpu(batch) for batch in batches], mse))
    assert {device.type for device, _ in seen} == {CUDA}
    assert sum(rows for _, rows in seen) == 2 * ROWS
    assert max(rows for _, rows in seen) <= micro_batch_size
    for batch, copy in zip(batches, before, strict=True):
        assert all(torch.equal(batch[name], copy[name]) for name in batch), "the batch itself is left as it was"


def test_the_device_holds_micro_batches_not_the_batch() -> None:
    """16 pieces of 4 MiB: two of them are there at a time, and what a forward and backward of one takes."""
    rows, features, size = 1024, 16 * 1024, 4 * 2**20
    model = nn.Linear(features, 1, bias=False, device=CUDA)
    batch = torch.randn(rows, features)
    train_step = ga.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, x: model(x).mean(), micro_batch_size=64
    )
    train_step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_step(batch)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 5 * size


# ------------------------------------------------------------------------------------------------------- random numbers
@EVERY_WAY
def test_dropout_draws_what_a_loop_by_hand_would(way: str) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double().to(CUDA)

    def loss(model: nn.Module, batch: Batch) -> ga.Loss:
        return ga.Loss.sum((model(batch["x"]) - batch["y"]).square().sum(), over=len(batch["x"]))

    batch = on_gpu(BATCHES[0])
    sizes = RAGGED if way == "own loop" else [4, 3, 3, 3]
    torch.manual_seed(7)
    for piece in pieces(batch, sizes):
        (loss(model, piece).total / ROWS).backward()
    expected = gradients_of(model)
    after = torch.cuda.get_rng_state()
    model.zero_grad()

    torch.manual_seed(7)
    made = WAYS[way](model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], loss)

    assert_same_gradients(made[0].gradients, expected)
    assert torch.equal(torch.cuda.get_rng_state(), after)


# ----------------------------------------------------------------------------------------------- no wait for the device
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("weighted", ["host", "device"])
def test_no_wait_in_your_own_loop(weighted: str, clip_norm: float | None) -> None:
    model = make_model("mlp").float().to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=4, clip_norm=clip_norm)
    criterion = ga.criterion(nn.CrossEntropyLoss())
    stream = [piece for batch in BATCHES * 2 for piece in pieces(on_gpu(batch, torch.float32), RAGGED)]

    def loss(batch: Batch) -> ga.Loss | Tensor:
        if weighted == "device":
            return criterion(model(batch).transpose(1, 2), batch["labels"])
        return mse(model, batch)

    updates: list[ga.Update] = []
    one_pass = iter(accumulator.over(stream))
    for _ in range(8):  # two windows of warming up: what is made once may wait
        accumulator.backward(loss(next(one_pass)))
    with no_waiting():
        for _ in range(8):
            update = accumulator.backward(loss(next(one_pass)))
            if update:
                updates.append(update)
    assert [update.index for update in updates] == [3, 4]
    assert not any(update.skipped for update in updates)
    assert all(update.loss.isfinite() for update in updates)
    assert next(one_pass, None) is None


def test_no_wait_with_the_whole_batch_in_hand() -> None:
    model = make_model("mlp").float().to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train_step = ga.TrainStep(model, optimizer, mse, micro_batch_size=4, clip_norm=0.05)
    batch = on_gpu(BATCHES[0], torch.float32)
    train_step(batch)
    with no_waiting():
        update = train_step(batch)
    assert not update.skipped
    assert update.loss.device.type == CUDA


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_fused_optimizer_skips_by_itself_without_a_wait(clip_norm: float | None) -> None:
    model = make_model("linear").float().to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train_step = ga.TrainStep(model, optimizer, mse, micro_batch_size=4, clip_norm=clip_norm)
    good = on_gpu(BATCHES[0], torch.float32)
    bad = {**good, "x": good["x"].clone()}
    bad["x"][6] = float("inf")
    train_step(good)
    before, steps = parameters_of(model), [state["step"].clone() for state in optimizer.state.values()]
    with no_waiting():
        update = train_step(bad)
    assert update.skipped
    assert update.index == 2
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert [state["step"] for state in optimizer.state.values()] == steps
    assert not train_step(good).skipped


# ------------------------------------------------------------------------------------------------------ mixed precision
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_WAY
def test_autocast(way: str, dtype: torch.dtype, fused: bool, clip_norm: float | None) -> None:
    model = make_model("mlp").float().to(CUDA)
    whole = make_model("mlp").to(CUDA)
    whole.load_state_dict(model.state_dict())
    batches = [on_gpu(BATCHES[0], torch.float32)]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(CUDA, dtype):
            return F.mse_loss(model(batch).float(), batch["y"])

    scaler = GradScaler(CUDA) if dtype is torch.float16 else None
    before = parameters_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    made = WAYS[way](model, optimizer, batches, loss_fn, scaler=scaler, clip_norm=clip_norm)
    optimizer = torch.optim.SGD(whole.parameters(), lr=1.0)
    expected = whole_batches(whole, optimizer, [on_gpu(BATCHES[0])], mse, clip_norm=clip_norm)

    # A fused optimizer divides by the scale itself, so that what it did is looked at, not the gradient it was handed.
    moved = {name: value - before[name] for name, value in made[0].parameters.items()}
    right = {name: value - before[name].double() for name, value in expected[0].parameters.items()}
    assert relative_error(moved, right) < (FP16 if dtype is torch.float16 else BF16)
    assert_same_number(made[0].loss, expected[0].loss, tolerance=BF16)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_backs_off_and_the_update_is_skipped(fused: bool) -> None:
    model = make_model("linear").float().to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = GradScaler(CUDA)
    train_step = ga.TrainStep(model, optimizer, mse, micro_batch_size=4, scaler=scaler, scheduler=scheduler)
    good = on_gpu(BATCHES[0], torch.float32)
    bad = {**good, "x": good["x"].clone()}
    bad["x"][0] = float("nan")
    train_step(good)
    before = parameters_of(model)
    update = train_step(bad)
    assert update.skipped
    assert update.index == 2
    assert scheduler.last_epoch == 1
    assert scaler.get_scale() == 2.0**15
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert not train_step(good).skipped
