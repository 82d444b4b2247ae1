"""On a GPU whose memory is capped: batches that cannot fit are trained, again and again, and nothing piles up."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from oracle import SINGLE, assert_same_gradients, assert_same_number, parameters_of

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
MIB = 1 << 20

# 1,024 rows keep 9 activations of 32,768 fp32 numbers each: 1.1 GiB. Room is left for a third of it.
ROWS, WIDTH = 1024, 32768
ROOM_BYTES = 400 * MIB
# The allocator rounds large blocks up to 20 MiB and small ones to 2 MiB segments.
SLACK_BYTES = 48 * MIB


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, WIDTH), *[nn.LeakyReLU(0.9) for _ in range(7)], nn.Linear(WIDTH, 1)]
    return nn.Sequential(*layers).to(CUDA)


def make_batch(rows: int = ROWS, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=made), torch.randn(rows, 1, generator=made)


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@contextmanager
def only(room: int) -> Iterator[None]:
    """While held, no more than ``room`` bytes above what is allocated now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + room) / total, CUDA)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
        gc.collect()
        torch.cuda.empty_cache()


def filled_up() -> list[Tensor]:
    """Blocks of both of the allocator's pools, until there are no more."""
    blocks: list[Tensor] = []
    for num_bytes in (2 * MIB, MIB // 8):
        try:
            while True:
                blocks.append(torch.empty(num_bytes, dtype=torch.uint8, device=CUDA))
        except torch.OutOfMemoryError:
            continue
    return blocks


def warmed_up(model: nn.Module) -> nn.Module:
    """Whatever the libraries keep for themselves (cuBLAS's workspace) is there."""
    mse(model, [part.to(CUDA) for part in make_batch(4)]).backward()
    model.zero_grad()
    return model


def test_the_whole_batch_really_does_not_fit() -> None:
    model = warmed_up(make_model())
    batch = [part.to(CUDA) for part in make_batch()]
    with only(ROOM_BYTES), pytest.raises(torch.OutOfMemoryError):
        mse(model, batch).backward()


def test_a_batch_that_cannot_fit_is_trained_in_pieces_that_do() -> None:
    model = warmed_up(make_model())
    other = copy.deepcopy(model)
    batches = [make_batch(seed=seed) for seed in range(5)]
    step = ga.TrainStep(model, sgd(model), mse)
    with only(ROOM_BYTES):
        updates = [step(batch) for batch in batches]
        losses = [update.loss.item() for update in updates]
    whole = ga.TrainStep(other, sgd(other), mse, micro_batch_size=ROWS)
    expected = [whole(batch).loss.item() for batch in batches]
    assert all(update.micro_batch_size < ROWS for update in updates)
    assert [update.samples for update in updates] == [ROWS] * 5
    for loss, right in zip(losses, expected, strict=True):
        assert_same_number(loss, right, tolerance=SINGLE)
    assert_same_gradients(parameters_of(model), parameters_of(other), tolerance=SINGLE)


def test_running_out_of_memory_over_and_over_leaks_nothing() -> None:
    """The state is forgotten before each update, so that each meets the limit anew."""
    model = warmed_up(make_model())
    step = ga.TrainStep(model, sgd(model), mse)
    nothing_known = step.state_dict()
    allocated: list[int] = []
    reserved: list[int] = []
    retries: list[int] = []
    with only(ROOM_BYTES):
        for index in range(24):
            step.load_state_dict(nothing_known)
            step(make_batch(seed=index % 3))
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated(CUDA))
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved(CUDA))
            retries.append(torch.cuda.memory_stats(CUDA)["num_ooms"])
    assert retries[-1] > retries[3], "memory did not run out again"
    settled = allocated[2:]  # by then the optimizer has its state
    assert max(settled) - min(settled) < MIB
    assert max(reserved[2:]) - min(reserved[2:]) <= SLACK_BYTES


def test_limits_that_move_both_ways_leave_no_fragments() -> None:
    """After each limit what fits is what fitted under it the first time."""
    model = warmed_up(make_model())
    step = ga.TrainStep(model, sgd(model), mse)
    step(make_batch())  # the optimizer's state is there from now on
    fitted: dict[int, list[int]] = {}
    for _ in range(4):
        for room in (300 * MIB, 800 * MIB, 200 * MIB):
            with only(room):
                fresh = ga.TrainStep(model, sgd(model), mse)
                for seed in range(4):
                    update = fresh(make_batch(seed=seed))
                fitted.setdefault(room, []).append(update.micro_batch_size)
                del fresh, update
    # Times may choose between sizes that are as fast; what must not happen is that less and less fits.
    for sizes in fitted.values():
        assert min(sizes) >= sizes[0] // 2


def test_one_sample_that_does_not_fit() -> None:
    model = warmed_up(make_model())
    optimizer = sgd(model)
    step = ga.TrainStep(model, optimizer, mse)
    state = torch.cuda.get_rng_state(CUDA)
    before = parameters_of(model)
    with only(0):
        hold = filled_up()
        with pytest.raises(ga.DoesNotFitError, match="single sample"):
            step((torch.randn(2, 16), torch.randn(2, 1)))
        del hold
    assert torch.equal(torch.cuda.get_rng_state(CUDA), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_gradients(parameters_of(model), before, tolerance=0)
    assert step(make_batch(8)).index == 1


def test_dropout_on_the_device_goes_on_as_in_the_undisturbed_run() -> None:
    def run(room: int) -> tuple[Tensor, Tensor]:
        model = warmed_up(nn.Sequential(make_model(), nn.Dropout(0.1)))
        step = ga.TrainStep(model, sgd(model), mse)
        torch.manual_seed(3)
        with only(room):
            step(make_batch())
        return torch.cuda.get_rng_state(CUDA), torch.get_rng_state()

    for one, other in zip(run(ROOM_BYTES), run(8 << 30), strict=True):
        assert torch.equal(one, other)
