"""Out-of-memory is a transaction: whatever fails, whenever it does, the update is the whole batch's.

Memory runs out where `scarce.Memory` says; times are those of `scarce.Clock` where the sizes have to be known ahead.
"""

import copy
import functools
import gc
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import gradaccum as ga
from oracle import (
    EXACT,
    assert_same,
    assert_same_gradients,
    assert_same_number,
    gradients_of,
    parameters_of,
    whole_batches,
    whole_in_hand,
)
from scarce import TEXT, Clock, Memory, Scarce, counting, known_times, torch_error

unchecked = functools.partial(ga.TrainStep, check="off")  # what is injected is meant for training

EITHER = pytest.mark.parametrize("where", ["forward", "backward"])
FEATURES, ROWS = 3, 16

# The scaler multiplies by a power of two, which costs nothing; but a correction goes through its fp32 scale: 2**-24.
SCALED = 1e-7


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Each failure collects garbage: what was imported before need not be looked through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    """Memory runs out in the middle: in backward the second layer's gradient has been added by then."""

    def __init__(self, memory: Memory, *, where: str = "forward", between: Any = None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)
        self.scarce = Scarce(memory, where=where)
        self.between = nn.Tanh() if between is None else between
        self.second = nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.scarce(self.first(x))))


Batch = tuple[Tensor, Tensor]


def make_batch(rows: int = ROWS, *, seed: int = 0) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, generator=made, dtype=torch.float64) for width in (FEATURES, 1))


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def rows_of(batch: Any) -> int:
    return len(batch[0])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Run:
    """A net that trains where memory is short, and a copy of it for which everything fits."""

    def __init__(
        self, *, where: str = "forward", between: Any = None, settled_at: int | None = None, **memory: Any
    ) -> None:
        self.memory = Memory(**memory)
        self.trains(Net(self.memory, where=where, between=between), mse)
        if settled_at is not None:
            settled(self.step, rows=settled_at)

    def trains(self, net: Any, loss: Callable[[nn.Module, Any], Any], **options: Any) -> None:
        self.net, self.loss = net, loss
        self.other = copy.deepcopy(net)
        for layer in self.other.modules():
            if isinstance(layer, Scarce):
                layer.memory = Memory()
        self.optimizer = sgd(net)
        self.step = unchecked(net, self.optimizer, loss, **options)

    def as_whole(
        self, batches: Iterable[Any], *, whole: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> list[ga.Update]:
        """Trains, and holds every update against the whole batch's, which the copy is trained with."""
        taken: list[Any] = []
        made, updates = whole_in_hand(
            self.step, self.net, self.optimizer, (taken.append(batch) or batch for batch in batches)
        )
        assert_same(made, whole_batches(self.other, sgd(self.other), taken, whole or self.loss))
        return updates


def settled(step: ga.TrainStep, *, rows: int = ROWS, elements: int = FEATURES + 1) -> None:
    """Leaves nothing to search: pieces are as large as they can be."""
    sizes = {"fastest": rows * elements, "caps": {}, "searched_rows": ROWS}
    step.load_state_dict({"updates": 0, "micro_batches": 0, "samples": 0, "sizes": sizes})


# ------------------------------------------------------------------------------------------- the whole batch's update
@EITHER
@settings(max_examples=15)
@given(data=st.data())
def test_the_limit_moves_both_ways_while_training(where: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 23), label="rows")
    limits = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 11, 1000]), min_size=3, max_size=14), label="limits")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    run = Run(where=where)
    updates = run.as_whole(make_batch(rows, seed=i) for i, run.memory.limit in enumerate(limits))
    assert [update.samples for update in updates] == [rows] * len(limits)
    assert [update.weight for update in updates] == [rows] * len(limits)
    assert all(update.micro_batch_size <= limit for update, limit in zip(updates, limits, strict=True))
    assert [update.index for update in updates] == [*range(1, len(limits) + 1)]


@EITHER
@pytest.mark.parametrize("at", range(5))
def test_one_failure_at_any_micro_batch(where: str, at: int) -> None:
    run = Run(where=where)
    clock = Clock(fixed=0, per_row=1)  # all alike, so that pieces stay small
    run.step = unchecked(run.net, run.optimizer, counting(clock, mse, rows_of))
    with known_times(clock):
        run.memory.countdown = at
        updates = run.as_whole([make_batch(seed=i) for i in range(3)])
    assert run.memory.failures == 1
    assert [update.samples for update in updates] == [ROWS] * 3


@pytest.mark.parametrize(
    "error",
    [
        torch_error,
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        lambda: RuntimeError("std::bad_alloc"),
        MemoryError,
    ],
    ids=["torch", "cpu", "cublas", "cudnn", "c++", "python"],
)
@EITHER
def test_however_it_is_said(where: str, error: Callable[[], BaseException]) -> None:
    run = Run(limit=3, error=error, where=where)
    updates = run.as_whole([make_batch()])
    assert run.memory.failures
    assert updates[0].micro_batch_size <= 3


@EITHER
def test_each_sample_counts_exactly_once(where: str) -> None:
    """Each row has a weight of its own, whose gradient counts how often that row was run."""
    memory, times = Memory(limit=5), nn.Embedding(ROWS, 1, dtype=torch.float64)
    model = nn.Sequential(times, Scarce(memory, where=where))
    nn.init.zeros_(times.weight)
    step = unchecked(model, torch.optim.SGD(model.parameters(), lr=1.0), lambda m, ids: m(ids).mean())
    update = step(torch.arange(ROWS))
    assert memory.failures
    assert update.samples == ROWS
    torch.testing.assert_close(times.weight.detach(), torch.full((ROWS, 1), -1 / ROWS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("limit_at", "updates", "most_failures"),
    [
        pytest.param(lambda i: 3 if 10 <= i < 20 else 1000, 100, 5, id="16, 8 and 4 as the limit falls, and trials"),
        pytest.param(lambda i: 5, 300, 8, id="waits of 8, 16, 32, 64, 128 updates, and the search's own"),
    ],
)
def test_the_size_grows_back_and_settles(limit_at: Callable[[int], int], updates: int, most_failures: int) -> None:
    run = Run()
    sizes = []
    with known_times(clock := Clock()):
        step = unchecked(run.net, run.optimizer, counting(clock, mse, rows_of))
        for index in range(updates):
            run.memory.limit = limit_at(index)
            sizes.append(step(make_batch(seed=index)).micro_batch_size)
            assert sizes[-1] <= run.memory.limit
    assert sizes[3:10] == [min(ROWS, limit_at(0) // 4 * 4)] * 7
    assert sizes[-1] == sizes[3]
    assert run.memory.failures <= most_failures


@EITHER
def test_a_trial_that_fails_changes_nothing(where: str) -> None:
    run = Run(limit=4, where=where, settled_at=ROWS)
    with known_times(Clock()):
        run.as_whole([make_batch(seed=i) for i in range(12)])
    assert run.memory.failures == 4  # 16, 8 and 6 in the first update; 6 again, on trial


def test_two_passes_with_a_short_last_batch() -> None:
    rows = [ROWS, ROWS, ROWS, 5] * 2
    updates = Run(limit=6, where="backward").as_whole(make_batch(rows, seed=i) for i, rows in enumerate(rows))
    assert [update.samples for update in updates] == rows


def by_length() -> Run:
    """A model for samples of any length, which needs memory for each element: 60 fit, of 4 features."""
    run = Run(limit=4 * 60)
    scarce = Scarce(run.memory, counts="elements")
    model = nn.Sequential(nn.Linear(1, 4), scarce, nn.Tanh(), nn.Linear(4, 1)).double()
    run.trains(model, lambda model, batch: model(batch.unsqueeze(2)).mean((1, 2)).square().mean())
    return run


def test_batches_of_varying_lengths() -> None:
    lengths = [10, 30, 20, 10, 30, 25, 10, 5, 30, 10]  # 6 samples of 10 fit, 2 of 30
    updates = by_length().as_whole(torch.randn(12, length, dtype=torch.float64) for length in lengths)
    assert all(update.micro_batch_size * length <= 60 for update, length in zip(updates, lengths, strict=True))


def test_what_one_length_has_shown_spares_longer_ones() -> None:
    run = by_length()
    for _ in range(4):
        run.step(torch.randn(12, 10, dtype=torch.float64))
    before = run.memory.failures
    run.step(torch.randn(12, 30, dtype=torch.float64))
    assert run.memory.failures == before


# -------------------------------------------------------------------------------------------- random state and buffers
class Noise(nn.Module):
    """Draws as many random numbers for a piece however large it is, so that what is drawn tells the pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 + torch.rand(x.shape[1], dtype=x.dtype))


RANDOM = {"dropout": lambda: nn.Dropout(0.3), "noise": Noise}


SHORT = {  # one piece of the first update runs out of memory, or all above a size, whose forward never fits
    **{
        f"at piece {at} in {where}{', settled' * is_settled}": ({"countdown": at}, where, is_settled, 1)
        for at in range(3)
        for where, is_settled in (("forward", False), ("backward", False), ("backward", True))
    },
    "a limit that stays": ({"limit": 3}, "forward", False, None),
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize(("short", "where", "is_settled", "failures"), SHORT.values(), ids=SHORT)
def test_what_is_drawn_after_the_update_is_what_the_undisturbed_run_draws(
    short: dict[str, int], where: str, is_settled: bool, failures: int | None, kind: str
) -> None:
    def drawn(**memory: Any) -> tuple[Tensor, int]:
        torch.manual_seed(1)
        run = Run(where=where, between=RANDOM[kind](), settled_at=4 if is_settled else None, **memory)
        torch.manual_seed(2)
        with known_times(Clock()):
            run.step(make_batch())
        return torch.get_rng_state(), run.memory.failures

    state, failed = drawn(**short)
    assert torch.equal(state, drawn()[0])
    assert failed == failures or (failures is None and failed)


def test_the_pieces_that_are_run_again_draw_from_the_first_state() -> None:
    """What ran out of memory drops the same units as if the smaller size had been taken at once."""
    run = Run(limit=4, where="backward", between=nn.Dropout(0.3), settled_at=ROWS)
    torch.manual_seed(3)
    with known_times(Clock()):
        loss = run.step.backward(make_batch())
    assert run.memory.failures == 3
    torch.manual_seed(3)
    at_once = unchecked(run.other, sgd(run.other), mse)
    settled(at_once, rows=4)
    expected = at_once.backward(make_batch())
    assert_same_gradients(gradients_of(run.net), gradients_of(run.other))
    assert_same_number(loss.value.item(), expected.value.item())


class Remembering(nn.Module):
    """Buffers of one's own: one changed in place, one replaced by a new tensor, one made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.total.add_(x.detach().sum(0))
        self.calls = self.calls + 1
        return torch.tanh(x)


@EITHER
@pytest.mark.parametrize("make", [Remembering, lambda: nn.BatchNorm1d(5)], ids=["own", "batch norm"])
@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")
def test_buffers_see_every_piece_once(make: Callable[[], nn.Module], where: str) -> None:
    run = Run(limit=4, where=where, between=make(), settled_at=ROWS)
    with known_times(Clock()):
        update = run.step(make_batch())
    unchecked(run.other, sgd(run.other), mse, micro_batch_size=4)(make_batch())
    assert run.memory.failures == 3
    assert update.micro_batches == 4
    for (name, buffer), expected in zip(run.net.named_buffers(), run.other.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=EXACT, atol=EXACT, msg=name)
    assert_same_gradients(parameters_of(run.net), parameters_of(run.other))


class Lazy(nn.Module):
    """Registers its counter when it first runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "samples"):
            self.register_buffer("samples", torch.tensor(0))
        self.samples = self.samples + len(x)
        return torch.tanh(x)


@EITHER
def test_a_buffer_that_a_failed_piece_has_registered_counts_nothing_twice(where: str) -> None:
    run = Run(limit=4, where=where, between=Lazy(), settled_at=ROWS)
    with known_times(Clock()):
        run.step(make_batch())
    assert run.memory.failures == 3
    assert run.net.between.samples == ROWS


class Expanded(nn.Module):
    """A buffer that torch refuses to write to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64).expand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_expanded_buffers_do_not_stand_in_the_way_of_another_attempt() -> None:
    run = Run(limit=4, between=Expanded(), settled_at=ROWS)
    with known_times(Clock()):
        run.as_whole([make_batch()])
    assert run.memory.failures == 3


def normalising(loss: Callable[[nn.Module, Any], Tensor], *, in_place: bool) -> Callable[[nn.Module, Any], Tensor]:
    def normalised(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return loss(model, (x.div_(255).sub_(0.5) if in_place else x / 255 - 0.5, y))

    return normalised


@EITHER
@pytest.mark.parametrize("in_place", [True, False])
def test_a_batch_that_a_forward_has_changed_is_not_run_twice(where: str, in_place: bool) -> None:
    run = Run(limit=4, where=where)
    run.trains(run.net, normalising(mse, in_place=in_place))
    settled(run.step)
    before = parameters_of(run.net)
    with known_times(Clock()):
        if not in_place:  # what the error says to write
            run.as_whole([make_batch()])
            return
        with pytest.raises(ga.MisuseError, match=r"changes 1 of its 2 tensors in place \(shape \(16, 3\)\)"):
            run.step(make_batch())
        assert_same_gradients(parameters_of(run.net), before, tolerance=0)
        assert run.step.updates == 0
        assert all(parameter.grad is None for parameter in run.net.parameters())
        run.memory.limit = ROWS  # where nothing fails, it is the user's own affair, as in a loop by hand
        made, _ = whole_in_hand(run.step, run.net, run.optimizer, [make_batch()])
        plainly = normalising(mse, in_place=False)
        assert_same(made, whole_batches(run.other, sgd(run.other), [make_batch()], plainly))


def test_batch_norm_and_dropout_together_count_no_forward_twice() -> None:
    """The forwards that are run for the random state alone leave no trace in the statistics."""
    run = Run(limit=4, where="backward", between=nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5)))
    with known_times(Clock()), pytest.warns(ga.GradAccumWarning):
        run.step(make_batch())
    assert run.memory.failures == 3
    assert run.net.between[0].num_batches_tracked.item() == 4


@pytest.mark.parametrize("kind", RANDOM)
def test_how_a_batch_is_cut_does_not_show_in_what_is_drawn_later(kind: str) -> None:
    """Sizes depend on how busy a machine is; the order of the next epoch's data must not."""

    def drawn(rows: int) -> Tensor:
        torch.manual_seed(5)
        assert Run(between=RANDOM[kind](), settled_at=rows).step(make_batch()).micro_batch_size == rows
        return torch.get_rng_state()

    assert torch.equal(drawn(16), drawn(2))


def test_two_updates_draw_different_numbers() -> None:
    step = Run(between=nn.Dropout(0.5), settled_at=ROWS).step
    assert step.backward(make_batch()).value != step.backward(make_batch()).value


def test_where_nothing_is_drawn_the_random_state_stays() -> None:
    run, state = Run(limit=3), torch.get_rng_state()
    run.step(make_batch())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- other ways to be called
@EITHER
def test_backward_adds_to_what_was_there(where: str) -> None:
    run = Run(limit=3, where=where)
    run.net(make_batch(2, seed=9)[0]).sum().backward()
    mse(run.other, make_batch()).backward()
    run.other(make_batch(2, seed=9)[0]).sum().backward()
    loss = run.step.backward(make_batch())
    assert run.memory.failures
    assert_same_gradients(gradients_of(run.net), gradients_of(run.other))
    assert_same_number(loss.value.item(), mse(run.other, make_batch()).item())


def test_backward_that_cannot_fit_leaves_the_gradients_that_were_there() -> None:
    run = Run(where="backward")
    run.net(make_batch(2, seed=9)[0]).sum().backward()
    before = gradients_of(run.net)
    run.memory.limit = 0
    with pytest.raises(ga.DoesNotFitError):
        run.step.backward(make_batch())
    assert_same_gradients(gradients_of(run.net), before, tolerance=0)


def test_several_terms_whose_weights_are_known_ahead() -> None:
    run = Run(limit=3, where="backward")

    def loss(model: nn.Module, batch: Any) -> dict[str, ga.Loss]:
        x, y = batch
        positive = (y > 0).double()
        errors = (model(x) - y).square()
        return {
            "all": ga.Loss.mean(errors.mean(), over=len(x)),
            "positive": ga.Loss.sum((errors * positive).sum(), over=positive.sum()),
        }

    def weights(batch: Any) -> dict[str, Any]:
        return {"all": len(batch[0]), "positive": (batch[1] > 0).sum()}

    def whole(model: nn.Module, batch: Any) -> Tensor:
        errors = (model(batch[0]) - batch[1]).square()
        return errors.mean() + errors[batch[1] > 0].mean()

    run.trains(run.net, loss, weights=weights)
    run.as_whole((make_batch(seed=i) for i in range(4)), whole=whole)
    assert run.memory.failures


def test_weights_of_tokens() -> None:
    run = Run(limit=3)

    def total(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * batch[1].abs()).sum()

    run.trains(run.net, lambda model, batch: ga.Loss.sum(total(model, batch), over=batch[1].abs().sum()))
    batches = [make_batch(seed=i) for i in range(4)]
    run.as_whole(batches, whole=lambda model, batch: total(model, batch) / batch[1].abs().sum())
    assert run.memory.failures


@EITHER
def test_a_scaler(where: str) -> None:
    run = Run(limit=3, where=where)
    scaler = GradScaler("cpu", init_scale=1024.0)
    run.trains(run.net, mse, scaler=scaler)
    batches = [make_batch(seed=i) for i in range(4)]
    for batch in batches:
        run.step(batch)
    whole_batches(run.other, sgd(run.other), batches, mse)
    assert run.memory.failures
    assert scaler.get_scale() == 1024.0
    assert_same_gradients(parameters_of(run.net), parameters_of(run.other), tolerance=SCALED)


def test_clipping_and_a_scheduler_see_one_update() -> None:
    run = Run(limit=3, where="backward")
    batches = [make_batch(seed=i) for i in range(4)]
    theirs = sgd(run.other)
    mine, their = (torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (run.optimizer, theirs))
    step = unchecked(run.net, run.optimizer, mse, clip_norm=0.1, scheduler=mine)
    made, _ = whole_in_hand(step, run.net, run.optimizer, batches)
    # Clipping adds 1e-6 to the norm in both.
    assert_same(made, whole_batches(run.other, theirs, batches, mse, clip_norm=0.1, scheduler=their))
    assert run.memory.failures


@EITHER
def test_cut_by_cost(where: str) -> None:
    run = Run(limit=2, where=where)
    run.trains(run.net, mse, split=ga.split_by_cost(lambda batch: 1 + torch.arange(len(batch[0])) % 5, 40))
    updates = run.as_whole(make_batch(seed=i) for i in range(3))
    assert run.memory.failures
    assert [update.samples for update in updates] == [ROWS] * 3
    assert updates[-1].micro_batch_size <= 2


def test_cut_by_cost_one_sample_that_does_not_fit() -> None:
    run = Run(limit=0)
    split = ga.split_by_cost(lambda batch: torch.full((len(batch[0]),), 7), 40)
    with pytest.raises(ga.DoesNotFitError, match="single sample"):
        unchecked(run.net, run.optimizer, mse, split=split)(make_batch())


@EITHER
def test_a_size_of_ones_own_is_not_tried_again(where: str) -> None:
    run = Run(countdown=1, where=where)  # the second piece: the first one has left gradients
    step = unchecked(run.net, run.optimizer, mse, micro_batch_size=8)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        step(make_batch())
    assert run.memory.failures == 1
    assert all(gradient is None for gradient in gradients_of(run.net).values())
    assert step(make_batch()).index == 1


def agreeing(run: Run, agree: Callable[[bool, int], bool]) -> list[bool]:
    """What the run asks the other processes, who agree by what failed here and how often they were asked."""
    asked: list[bool] = []

    def asking(failed_here: bool) -> bool:
        asked.append(failed_here)
        return agree(failed_here, len(asked))

    assert run.step._run.fitting is not None
    run.step._run.fitting.agree = asking
    return asked


def test_another_process_that_ran_out_of_memory_makes_this_one_run_again() -> None:
    run = Run()
    asked = agreeing(run, lambda failed_here, times: times == 1)  # elsewhere, at the first attempt
    updates = run.as_whole([make_batch(), make_batch(seed=1)])
    assert asked == [False, False, False]
    assert [update.samples for update in updates] == [ROWS, ROWS]


def test_the_other_processes_are_asked_also_where_this_one_failed() -> None:
    run = Run(countdown=0)
    asked = agreeing(run, lambda failed_here, times: failed_here)
    run.step(make_batch())
    assert asked == [True, False]


# ------------------------------------------------------------------------------------------------- what is not repaired
@EITHER
@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")
def test_one_sample_that_does_not_fit(where: str) -> None:
    run = Run(where=where, between=nn.Sequential(nn.Dropout(0.5), Remembering()))
    net, step = run.net, unchecked(run.net, torch.optim.Adam(run.net.parameters()), mse)
    step(make_batch())
    run.memory.limit = 0
    parameters, state = parameters_of(net), torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(ga.DoesNotFitError) as caught:
        step(make_batch())
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, ga.GradAccumError)
    numbers = (3 * 5 + 5 + 5 + 1) * 8
    held = (f"parameters {numbers} B", f"gradients {numbers} B", "optimizer state")
    for part in ("(16, 3), (16, 1)", *held, TEXT[:40], "checkpointing"):
        assert part in str(caught.value)
    assert all(gradient is None for gradient in gradients_of(net).values())
    assert_same_gradients(parameters_of(net), parameters, tolerance=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert (step.updates, step.samples) == (1, ROWS)
    run.memory.limit = 1000
    assert step(make_batch()).index == 2  # nothing is left that would be in the way


@pytest.mark.parametrize("rows", [1, ROWS, 1024])
def test_attempts_are_bounded_and_the_verdict_holds_none_of_the_failed_pieces(rows: int) -> None:
    run = Run(limit=0)
    with pytest.raises(ga.DoesNotFitError) as caught:
        run.step(make_batch(rows))
    assert run.memory.failures <= (math.log2(rows) + 2 if rows > 1 else 1)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


OTHERWISE = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("x"),
    KeyboardInterrupt(),
    SystemExit(),
]


@EITHER
@pytest.mark.parametrize("error", OTHERWISE, ids=lambda error: type(error).__name__)
def test_any_other_error_passes_through_as_it_is(where: str, error: BaseException) -> None:
    # The second piece: the first one has left gradients.
    run = Run(error=lambda: error, countdown=1, where=where, between=nn.Dropout(0.5))
    state = torch.get_rng_state()
    with pytest.raises(type(error)) as caught:
        run.step(make_batch())
    assert caught.value is error
    assert torch.equal(torch.get_rng_state(), state)
    assert run.memory.failures == 1
    assert all(gradient is None for gradient in gradients_of(run.net).values())
    assert run.step.updates == 0
    assert run.step(make_batch()).index == 1


def test_an_optimizer_that_runs_out_of_memory_is_not_asked_twice() -> None:
    class Greedy(torch.optim.SGD):
        steps = 0
        is_full = True

        def step(self, closure: Any = None) -> Any:
            type(self).steps += 1
            if self.is_full:
                raise torch_error()
            return super().step(closure)

    run = Run()
    optimizer = Greedy(run.net.parameters(), lr=0.1)
    step = unchecked(run.net, optimizer, mse)
    before = parameters_of(run.net)
    with pytest.raises(torch.OutOfMemoryError):
        step(make_batch())
    assert Greedy.steps == 1
    assert_same_gradients(parameters_of(run.net), before, tolerance=0)
    optimizer.is_full = False
    made, _ = whole_in_hand(step, run.net, optimizer, [make_batch()])
    assert Greedy.steps == 2
    assert_same(made, whole_batches(run.other, torch.optim.SGD(run.other.parameters(), lr=0.1), [make_batch()], mse))


def test_a_loss_without_graph_is_an_error_not_a_smaller_piece() -> None:
    run = Run()
    with pytest.raises(ga.LossError):
        unchecked(run.net, run.optimizer, lambda model, batch: model(batch[0]).detach().mean())(make_batch())


# ---------------------------------------------------------------------------------------------------- nothing is pinned
class Piece:
    """Lives as long as the failed piece's frames do. A tensor is kept by its graph too, which dies with it."""


@pytest.mark.parametrize("is_kept", [False, True])
@EITHER
def test_no_tensor_of_the_failed_piece_is_alive_in_the_next_attempt(
    where: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where someone keeps the errors, as tools that report them do."""
    monkeypatch.setattr("gradaccum.memory.out_of_memory.gc.collect", lambda: 0)  # it must not be needed
    made: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []

    class Watching(Net):
        def forward(self, x: Tensor) -> Tensor:
            alive.append([reference() is not None for reference in made])
            piece, activations = Piece(), self.first(x)
            made.extend([weakref.ref(piece), weakref.ref(activations)])
            value = self.second(self.between(self.scarce(activations)))
            del piece
            return value

    kept = [torch_error() for _ in range(3)]
    errors = iter(kept)
    memory = Memory(limit=4, error=lambda: next(errors) if is_kept else torch_error())
    net = Watching(memory, where=where)
    step = unchecked(net, sgd(net), mse)
    settled(step)
    with known_times(Clock()):
        step(make_batch())
    assert memory.failures == 3
    assert alive[0] == []
    assert alive[1] == [False, False]
    assert alive[2] == [False] * 4
    assert alive[3] == [False] * 6


# ---------------------------------------------------------------------------------------------------------------- state
def test_sizes_travel_with_the_state() -> None:
    run = Run(limit=5)
    for index in range(4):
        run.step(make_batch(seed=index))
    resumed = unchecked(run.net, run.optimizer, mse)
    resumed.load_state_dict(json.loads(json.dumps(run.step.state_dict())))  # plain enough for any file
    before = run.memory.failures
    update = resumed(make_batch())
    assert run.memory.failures == before
    assert update.index == 5
    assert update.micro_batch_size == run.step(make_batch()).micro_batch_size


def test_a_state_is_read_with_another_micro_batch_size() -> None:
    run = Run()
    auto, fixed = run.step, unchecked(run.net, run.optimizer, mse, micro_batch_size=4)
    auto(make_batch())
    fixed.load_state_dict(auto.state_dict())
    assert fixed(make_batch()).index == 2
    auto.load_state_dict(fixed.state_dict())
    assert auto(make_batch()).index == 3


# ------------------------------------------------------------------------------------------------------ what is told
def test_a_failure_is_told_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(limit=8, settled_at=ROWS)
    with caplog.at_level(logging.INFO, logger="gradaccum"), known_times(Clock()):
        run.step(make_batch())
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = [line for line in told if "out of memory with a micro-batch of 16 samples" in line]
    assert any("CUDA out of memory" in line for line in said)


def test_the_size_that_was_found_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    with caplog.at_level(logging.INFO, logger="gradaccum"), known_times(clock := Clock()):
        step = unchecked(run.net, run.optimizer, counting(clock, mse, rows_of))
        for index in range(12):
            step(make_batch(seed=index))
    told = [record.getMessage() for record in caplog.records if "to pin it" in record.getMessage()]
    assert len(told) == 1
    assert "micro_batch_size=16" in told[0]


@pytest.mark.parametrize("kind", [*RANDOM, "nothing"])
def test_the_line_says_how_to_repeat_a_run_where_numbers_are_drawn(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(between=RANDOM[kind]() if kind in RANDOM else None)
    with caplog.at_level(logging.INFO, logger="gradaccum"):
        for index in range(4):
            run.step(make_batch(seed=index))
    (line,) = [record.getMessage() for record in caplog.records if "to pin it" in record.getMessage()]
    assert ("Pin it for runs that are to repeat" in line) == (kind in RANDOM)


def test_a_pinned_size_repeats_a_run_with_dropout() -> None:
    def last(size: Any) -> Tensor:
        torch.manual_seed(4)
        run = Run(between=nn.Dropout(0.5))
        run.trains(run.net, mse, micro_batch_size=size)
        for index in range(6):
            run.step(make_batch(seed=index))
        return torch.cat([parameter.detach().flatten() for parameter in run.net.parameters()])

    assert torch.equal(last(5), last(5))
    assert not torch.equal(last(5), last(8)), "or there would be nothing to pin"


@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")
def test_layers_that_see_the_micro_batch_are_never_split_without_need() -> None:
    run = Run(between=nn.BatchNorm1d(5))
    assert [run.step(make_batch(seed=index)).micro_batches for index in range(5)] == [1] * 5
