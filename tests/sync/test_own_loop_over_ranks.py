"""The loop of the README on several processes, whose loaders need not have equally much."""

import copy
import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga
from oracle import assert_same, assert_same_gradients, own_loop, parameters_of, whole_batches
from ranks import results_of
from tasks import LOSSES, make_batch, make_model
from wrapping import PASSES, WINDOW, sgd, windows, wrapped

NOTHING_ON_ONE = [[], [3, 1, 4]]


def check_own_loop(rank: int, rows: list[list[int]], loss_name: str, how: str, **options: Any) -> None:
    case = LOSSES[loss_name]
    streams, batches = windows(rows)
    model = make_model("mlp")
    alone = copy.deepcopy(model)
    expected = whole_batches(alone, sgd(alone), batches, case.for_oracle, clip_norm=options.get("clip_norm"))
    trained = wrapped(model, how)
    optimizer = sgd(model)
    accumulator = ga.Accumulator(trained, optimizer, micro_batches=WINDOW, weights=case.weights, **options)
    loss = partial(case.for_library, trained)
    made, updates = own_loop(accumulator, model, optimizer, [streams[rank]], lambda _, batch: loss(batch))
    assert_same(made, expected[: len(made)])  # a rank whose loader is exhausted sees no more of them,
    assert_same_gradients(parameters_of(model), expected[-1].parameters)  # and makes them all the same
    assert accumulator.updates == len(batches)
    assert accumulator.samples == sum(map(sum, rows))
    assert accumulator.micro_batches == sum(map(len, rows))
    for update, batch in zip(updates, batches, strict=False):
        assert update.samples == len(batch["x"])


def every_pass(rank: int, world_size: int) -> None:
    for rows in [*PASSES.values(), NOTHING_ON_ONE]:
        for how in ("plain", "DDP"):
            for loss_name in ("plain mean", "mean over tokens"):
                check_own_loop(rank, rows, loss_name, how)
        check_own_loop(rank, rows, "terms of their own", "plain")
        check_own_loop(rank, rows, "plain mean", "DDP", clip_norm=0.1)
    drops(rank)
    counts_samples(rank)
    forward_is_restored(rank)
    several_passes(rank)
    options_are_refused()


def drops(rank: int) -> None:
    """A window to which one rank has nothing complete to add is dropped on all."""
    streams, batches = windows([[3, 3, 3], [3, 3, 3, 3]])
    model = make_model("mlp")
    alone = copy.deepcopy(model)
    expected = whole_batches(alone, sgd(alone), batches[:1], LOSSES["plain mean"].for_oracle)
    optimizer = sgd(model)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=WINDOW, tail="drop")
    made, _ = own_loop(accumulator, model, optimizer, [streams[rank]], LOSSES["plain mean"].for_library)
    assert_same(made, expected)
    assert accumulator.updates == 1


def counts_samples(rank: int) -> None:
    """``batch_size`` is that of all processes: 13 samples are 7 and 6."""
    stream = [make_batch(rows, seed=rank) for rows in ((3, 4), (6,))[rank]]
    model = make_model("mlp")
    optimizer = sgd(model)
    accumulator = ga.Accumulator(model, optimizer, batch_size=13)
    _, updates = own_loop(accumulator, model, optimizer, [stream], LOSSES["plain mean"].for_library)
    assert [(update.samples, update.micro_batches) for update in updates] == [(13, 3)]


def forward_is_restored(rank: int) -> None:
    """What was taken over is as it was, also when the loop raises; outside of a pass DDP is refused."""
    trained = wrapped(make_model("mlp"), "DDP")
    accumulator = ga.Accumulator(trained, sgd(trained), micro_batches=2)
    with pytest.raises(KeyError):
        leave_early(accumulator, trained)
    gc.collect()  # the traceback held the loop
    assert "forward" not in vars(trained)
    with pytest.raises(ga.MisuseError, match=r"outside of over\(\)"):
        accumulator.backward(ga.Loss.mean(trained(make_batch(3)).mean(), over=3))


def leave_early(accumulator: ga.Accumulator, trained: nn.Module) -> None:
    for batch in accumulator.over([make_batch(3)]):
        assert "forward" in vars(trained)
        raise KeyError(len(batch["x"]))


def several_passes(rank: int) -> None:
    """An optimizer with momentum, a scheduler and clipping over passes of unequal length."""
    model = make_model("mlp")
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=1, scheduler=scheduler, clip_norm=1.0)
    passes = [[make_batch(2, seed=epoch)] * (1 + (rank + epoch) % 2) for epoch in range(3)]
    own_loop(accumulator, model, optimizer, passes, LOSSES["plain mean"].for_library)
    assert accumulator.updates == 6
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**6


def options_are_refused() -> None:
    """An option about gradients that several processes cannot have, unless each of them trains for itself."""
    model = nn.Linear(2, 1)
    made: dict[str, Any] = {"micro_batch_size": 2, "persistent_gradients": True}
    with pytest.raises(ga.UnsupportedError, match=r"persistent_gradients=.* with several processes"):
        ga.TrainStep(model, sgd(model), lambda model, x: model(x).mean(), **made)
    ga.TrainStep(model, sgd(model), lambda model, x: model(x).mean(), sync="never", **made)(torch.ones(5, 2))


def test_every_pass() -> None:
    results_of(every_pass, 2)
