"""FSDP2 on two and four real processes: shards, nested modules, and a mesh with replicas."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import gradaccum as ga
from oracle import EXACT, SINGLE, assert_same_gradients, whole_batches
from ranks import results_of
from tasks import LOSSES, Batch, make_batch, make_model, pieces
from wrapping import PASSES, WINDOW, Branches, full_tensor, sgd, sharded, windows

SHARES = {
    2: {"even": [[6, 6], [6, 6]], "uneven": [[11, 2], [3, 10]], "one empty": [[13, 1], [0, 7], [5, 0]]},
    4: {"uneven": [[7, 1, 5, 2], [1, 9, 2, 3]], "three empty": [[3, 1, 1, 1], [0, 13, 0, 0], [4, 0, 0, 0]]},
}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        hidden = batch["x"]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def full(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}


def nested(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Nested().to(dtype)


def check(
    rank: int, world_size: int, model: nn.Module, loss: str, shares: list[list[int]], replicas: int = 1, **options: Any
) -> None:
    case = LOSSES[loss]
    batches = [make_batch(sum(sizes), seed=i) for i, sizes in enumerate(shares)]
    own = [pieces(batch, sizes)[rank] for batch, sizes in zip(batches, shares, strict=True)]
    alone = copy.deepcopy(model)
    expected = whole_batches(alone, sgd(alone), batches, case.for_oracle, clip_norm=options.get("clip_norm"))
    model = sharded(model, world_size, replicas=replicas)
    optimizer = sgd(model)
    step = ga.TrainStep(model, optimizer, case.for_library, weights=case.weights, **options)
    for batch, right, whole in zip(own, expected, batches, strict=True):
        update = step(batch)
        assert_same_gradients(full(model), right.parameters, where="parameter ")
        assert abs(update.loss.item() - right.loss) <= EXACT * max(1.0, abs(right.loss))
        assert update.samples == len(whole["x"])
        assert update.weight == case.weight(whole)
        if update.grad_norm is not None and right.grad_norm is not None:
            assert abs(update.grad_norm.item() - right.grad_norm) <= EXACT * right.grad_norm


def every_share(rank: int, world_size: int) -> None:
    for shares in SHARES[world_size].values():
        for replicas in (1, 2) if world_size == 4 else (1,):
            for sync in ("auto", "last", "every")[: 3 if world_size == 2 or replicas == 2 else 1]:
                options: dict[str, Any] = {"replicas": replicas, "sync": sync}
                check(rank, world_size, nested(), "plain mean", shares, micro_batch_size=4, **options)
            check(rank, world_size, nested(), "mean over tokens", shares, micro_batch_size=3, clip_norm=0.1, **options)
        if world_size == 4:
            continue
        check(rank, world_size, nested(), "terms of their own", shares, micro_batch_size=4)
        check(rank, world_size, make_model("mlp"), "plain sum", shares, micro_batch_size=4)
        check(rank, world_size, make_model("attention"), "class weights", shares, micro_batch_size=2, clip_norm=0.1)
    if world_size == 2:
        torch.manual_seed(0)
        for sync in ("auto", "last"):
            check(rank, 2, Branches().double(), "plain mean", SHARES[2]["uneven"], micro_batch_size=2, sync=sync)
        check(rank, 2, nested(), "plain mean", SHARES[2]["even"])


def every_pass(rank: int, world_size: int) -> None:
    """The user's own loop, whose last micro-batch is handed out again where others have more."""
    case = LOSSES["mean over tokens"]
    for rows in PASSES.values():
        for sync in ("auto", "last"):
            streams, batches = windows(rows)
            model = nested()
            alone = copy.deepcopy(model)
            expected = whole_batches(alone, sgd(alone), batches, case.for_oracle)
            model = sharded(model, world_size)
            accumulator = ga.Accumulator(model, sgd(model), micro_batches=WINDOW, sync=sync)
            made = []
            for batch in accumulator.over(streams[rank]):
                update = accumulator.backward(case.for_library(model, batch))
                if update:
                    made.append((update.samples, full(model)))
            # Every process runs as many forwards as the others, so it sees every update.
            for (samples, parameters), right, whole in zip(made, expected, batches, strict=True):
                assert_same_gradients(parameters, right.parameters, where="parameter ")
                assert samples == len(whole["x"])
            assert accumulator.micro_batches == sum(map(len, rows))
    refused(rank, world_size)
    single_precision(rank, world_size)
    not_finite(rank, world_size)
    scaled(rank, world_size)


def refused(rank: int, world_size: int) -> None:
    model = sharded(nested(), world_size)
    with pytest.raises(ga.UnsupportedError, match='tail="drop" with FSDP2'):
        ga.Accumulator(model, sgd(model), micro_batches=2, tail="drop")
    with pytest.raises(ga.UnsupportedError, match='sync="never" leaves'):
        ga.TrainStep(model, sgd(model), LOSSES["plain mean"].for_library, sync="never")
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=2)
    with pytest.raises(ga.MisuseError, match=r"outside of over\(\)"):
        accumulator.backward(ga.Loss.mean(torch.ones((), requires_grad=True), over=3))


def in_single_precision(rank: int, world_size: int) -> tuple[nn.Module, Batch, dict[str, Tensor]]:
    """A sharded model in fp32, this rank's share of a batch, and the parameters after an update with all of it."""
    model = nested(torch.float32)
    alone = copy.deepcopy(model)
    batch = {name: value.float() if value.is_floating_point() else value for name, value in make_batch(13).items()}
    expected = whole_batches(alone, sgd(alone), [batch], LOSSES["plain mean"].for_oracle)
    return sharded(model, world_size), pieces(batch, [9, 4])[rank], expected[0].parameters


def single_precision(rank: int, world_size: int) -> None:
    """In fp32 FSDP2 averages on its way, which is undone; with a factor of the user's too."""
    for factor in (None, 4.0):
        model, own, expected = in_single_precision(rank, world_size)
        if factor is not None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(factor)
                    module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on its way
        step = ga.TrainStep(model, sgd(model), LOSSES["plain mean"].for_library, micro_batch_size=3)
        step(own)
        assert_same_gradients(full(model), expected, tolerance=SINGLE)


def not_finite(rank: int, world_size: int) -> None:
    """A gradient that is not finite in one shard skips the update on all processes."""
    model = sharded(nested(), world_size)
    before = full(model)
    step = ga.TrainStep(model, sgd(model), LOSSES["plain mean"].for_library, micro_batch_size=2)
    batch = make_batch(4, seed=rank)
    if rank == 1:
        batch["y"][0, 0, 0] = float("nan")
    update = step(batch)
    assert update.skipped
    assert_same_gradients(full(model), before, tolerance=0.0)


def scaled(rank: int, world_size: int) -> None:
    """A loss scale is undone, and one that is too large skips everywhere."""
    model, own, expected = in_single_precision(rank, world_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110, growth_interval=100)
    step = ga.TrainStep(model, sgd(model), LOSSES["plain mean"].for_library, micro_batch_size=3, scaler=scaler)
    large = {**own, "x": own["x"] * 1e4} if rank == 0 else own
    assert step(large).skipped
    assert not step(own).skipped
    assert_same_gradients(full(model), expected, tolerance=SINGLE)


@pytest.mark.parametrize(("run", "world_size"), [(every_pass, 2), (every_share, 2), (every_share, 4)])
def test_all(run: Callable[[int, int], None], world_size: int) -> None:
    results_of(run, world_size)
