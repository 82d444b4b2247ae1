"""One rank raises, runs out of memory, or is killed: the others end with an error that says so, and none waits."""

import copy
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradaccum as ga
from gradaccum.sync import faults
from gradaccum.sync.faults import Whereabouts
from oracle import assert_same_gradients, gradients_of, own_loop, parameters_of, whole_batches
from ranks import results_of, run_ranks
from tasks import LOSSES, Batch, make_batch, make_model, pieces
from wrapping import sgd, wrapped

CASE = LOSSES["plain mean"]


def failing(rank: int, *, at: int, fail: Callable[[], None]) -> Callable[[nn.Module, Batch], Any]:
    """A loss function that fails on rank 1, at one of its calls."""
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        if next(calls) == at and rank == 1:
            fail()
        return CASE.for_library(model, batch)

    return loss_fn


def raise_label() -> None:
    raise ValueError("label 7 is out of range")


def one_raises(rank: int, world_size: int) -> None:
    """All raise, nothing is updated, and the next batch is trained with as if nothing had been."""
    for how in ("plain", "DDP"):
        for size in (2, "auto"):
            model = make_model("mlp")
            alone = copy.deepcopy(model)
            trained = wrapped(model, how)
            batch = make_batch(9)
            own = pieces(batch, [4, 5] if world_size == 2 else [4, 4, 1])[rank]
            step = ga.TrainStep(trained, sgd(model), failing(rank, at=2, fail=raise_label), micro_batch_size=size)
            with pytest.raises(ValueError if rank == 1 else ga.RankError, match="label 7 is out of range") as caught:
                twice(step, own)
            assert rank == 1 or "rank 1: ValueError" in str(caught.value)
            expected = whole_batches(alone, sgd(alone), [batch] * (step.updates + 1), CASE.for_oracle)
            step(own)
            assert_same_gradients(parameters_of(model), expected[-1].parameters)


def twice(step: ga.TrainStep, batch: Batch) -> None:
    step(batch)
    step(batch)  # with "auto" a share may be run in one piece


def one_raises_in_its_loop(rank: int, world_size: int) -> None:
    """The same in one's own loop, where a loss is refused."""
    model = make_model("mlp")
    optimizer = sgd(model)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2)
    stream = [make_batch(3, seed=rank), make_batch(2, seed=rank)]
    loss = (lambda model, batch: model(batch)) if rank == 1 else CASE.for_library
    with pytest.raises(ga.LossError if rank == 1 else ga.RankError, match=r"shape \(3, 4, 3\)|rank 1: LossError"):
        own_loop(accumulator, model, optimizer, [stream], loss)


def one_runs_out_of_memory(rank: int, world_size: int) -> None:
    """All run the batch again, with the same gradient; where one sample does not fit, all stop."""
    for limit in (2, 0):
        model = make_model("mlp")
        alone = copy.deepcopy(model)

        def loss_fn(model: nn.Module, batch: Batch, limit: int = limit) -> Any:
            if rank == 1 and len(batch["x"]) > limit:
                raise torch.OutOfMemoryError("out of memory, as far as this test goes")
            return CASE.for_library(model, batch)

        batch = make_batch(13)
        own = pieces(batch, [6, 7] if world_size == 2 else [6, 7, 0])[rank]
        step = ga.TrainStep(wrapped(model, "DDP"), sgd(model), loss_fn)
        if limit:
            assert step.backward(own).weight == 13
            (expected,) = whole_batches(alone, sgd(alone), [batch], CASE.for_oracle)
            assert_same_gradients(gradients_of(model), expected.gradients)
        else:
            error = ga.DoesNotFitError if rank == 1 else ga.RankError
            with pytest.raises(error, match="single sample runs out of memory"):
                step(own)
            assert not any(parameter.grad is not None for parameter in model.parameters())


def not_killed(rank: int, world_size: int) -> None:
    one_raises(rank, world_size)
    one_raises_in_its_loop(rank, world_size)
    one_runs_out_of_memory(rank, world_size)
    one_raises_before_its_first_window(rank)
    different_places(rank)
    different_models(rank)


def one_raises_before_its_first_window(rank: int) -> None:
    """Also where the others exchange totals of the window, and have not met this process yet."""

    def weights(batch: Batch) -> int:
        if rank == 1:
            raise ValueError("this batch has no mask")
        return len(batch["x"])

    model = make_model("mlp")
    step = ga.TrainStep(model, sgd(model), CASE.for_library, micro_batch_size=2, weights=weights)
    for _ in range(2):
        with pytest.raises(ValueError if rank == 1 else ga.RankError, match="this batch has no mask"):
            step(make_batch(3))


def different_places(rank: int) -> None:
    """One process is at another update, or makes it in another way: all raise one error, which names both."""
    model = make_model("mlp")
    step = ga.TrainStep(model, sgd(model), CASE.for_library, micro_batch_size=2)
    if rank == 1:
        step.load_state_dict({"updates": 4, "micro_batches": 8, "samples": 12})
    other = ga.TrainStep(model, sgd(model), CASE.for_library, micro_batch_size=2 if rank == 1 else "auto")
    for different, message in (
        (step, "rank 0 closes the window of update 1 of a TrainStep .*, and rank 1 closes the window of update 5 of"),
        (other, "rank 0 looks for a micro-batch size in update 1 .*, and rank 1 closes the window of"),
    ):
        before = parameters_of(model)
        with pytest.raises(ga.RankError, match=message):
            different(make_batch(3))
        assert_same_gradients(parameters_of(model), before, tolerance=0.0)


def different_models(rank: int) -> None:
    for model, message in (
        (make_model("mlp" if rank else "linear"), "have different models"),
        (make_model("mlp", seed=rank), "start from different parameters"),
    ):
        step = ga.TrainStep(model, sgd(model), CASE.for_library, micro_batch_size=2)
        with pytest.raises(ga.RankError, match=message):
            step(make_batch(3))


@pytest.mark.parametrize("world_size", [2, 3])
def test_none_waits(world_size: int) -> None:
    results_of(not_killed, world_size)


def killed(rank: int, world_size: int, how: str) -> str:
    model = make_model("mlp")
    trained = fully_shard(model) if how == "FSDP2" else wrapped(model, how)
    loss_fn = failing(rank, at=5, fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
    step = ga.TrainStep(trained, sgd(trained), loss_fn, micro_batch_size=2)
    step(make_batch(6, seed=rank))
    with pytest.raises(ga.RankError) as caught:
        step(make_batch(6, seed=rank))
    print(caught.value, file=sys.stderr, flush=True)
    os._exit(7)  # what would come after it waits for the one that has gone


@pytest.mark.parametrize("how", ["plain", "DDP", "FSDP2"])
def test_one_is_killed(how: str) -> None:
    ended = run_ranks(killed, 3, how, seconds=200, group_seconds=60)
    assert [one.status for one in ended] == [7, -signal.SIGKILL, 7]
    for one in (ended[0], ended[2]):
        assert "rank 1" in one.stderr, one.stderr[-1500:]
        assert "ended without a word" in one.stderr


def raises_among_shards(rank: int, world_size: int) -> None:
    model = fully_shard(make_model("mlp"))
    ga.TrainStep(model, sgd(model), failing(rank, at=1, fail=raise_label), micro_batch_size=2)(make_batch(6))


def test_one_raises_among_shards() -> None:
    """Inside of FSDP2's collectives nobody can be told; the process that ends says why in the store."""
    ended = run_ranks(raises_among_shards, 2, seconds=200, group_seconds=60)
    assert all(one.status for one in ended)
    assert "RankError" in ended[0].stderr
    assert "rank 1 failed (ValueError: label 7 is out of range)" in ended[0].stderr
    assert "ValueError: label 7" in ended[1].stderr


def test_whereabouts() -> None:
    own = Whereabouts.own()
    assert not own.is_gone()
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert Whereabouts(own.host, child, 1).is_gone()  # ended, and not asked about yet
    os.waitpid(child, 0)
    assert Whereabouts(own.host, child, 1).is_gone()
    assert not Whereabouts("another host", child).is_gone()


class EndsWhileLookedAt(Whereabouts):
    """A process that hears of another's fault, says so and ends, all just before it is looked at."""

    def is_gone(self) -> bool:
        faults.report(1, "it ended without a word, as a process that is killed")
        return True


def test_who_ends_of_what_it_heard_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(faults, "_store", lambda: store)
    own = Whereabouts.own()
    message = faults.found([own, own, EndsWhileLookedAt(own.host, own.pid, 1)], own_rank=0)
    assert message == "rank 1 failed (it ended without a word, as a process that is killed)"
