"""Two, three and four real processes make the update that one would make from the whole batch.

Every rank trains with its shares and, beside that, one copy of the model on the whole batches in plain torch. The
tolerance is the oracle's own for one process: W processes add the same numbers in another order.
"""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradaccum as ga
from oracle import assert_same, assert_same_gradients, parameters_of, whole_batches, whole_in_hand
from ranks import results_of
from tasks import LOSSES, make_batch, make_model, pieces
from wrapping import Branches, sgd, wrapped

# Rows of each rank's share, one update after the other, by number of ranks.
SHARES: dict[int, dict[str, list[list[int]]]] = {
    2: {"even": [[6, 6], [6, 6]], "uneven": [[11, 2], [3, 10]], "one empty": [[13, 0], [0, 7], [5, 0]]},
    3: {"even": [[4, 4, 4], [4, 4, 4]], "uneven": [[7, 1, 5], [1, 1, 11]], "one empty": [[0, 6, 7], [6, 0, 1]]},
    4: {"uneven": [[7, 1, 5, 2], [1, 9, 2, 3]], "three empty": [[0, 13, 0, 0], [4, 0, 0, 0]]},
}
LOSS_NAMES = ("plain mean", "mean over tokens", "class weights", "plain sum", "terms of their own")


def check_train_step(
    rank: int, model: nn.Module, loss_name: str, shares: list[list[int]], how: str, **options: Any
) -> list[ga.Update]:
    """Trains on the shares and on the whole batches, and compares."""
    case = LOSSES[loss_name]
    batches = [make_batch(sum(sizes), seed=i) for i, sizes in enumerate(shares)]
    own = [pieces(batch, sizes)[rank] for batch, sizes in zip(batches, shares, strict=True)]
    alone = copy.deepcopy(model)
    expected = whole_batches(alone, sgd(alone), batches, case.for_oracle, clip_norm=options.get("clip_norm"))
    trained = wrapped(model, how)
    optimizer = sgd(model)
    step = ga.TrainStep(trained, optimizer, case.for_library, weights=case.weights, **options)
    made, updates = whole_in_hand(step, model, optimizer, own)
    assert_same(made, expected)
    for update, batch in zip(updates, batches, strict=True):
        assert update.samples == len(batch["x"])
        assert update.weight == case.weight(batch)
    assert step.samples == sum(map(sum, shares))
    return updates


def check_not_finite(rank: int, how: str) -> None:
    """A NaN on one rank skips the update on all; a loss scale that is too large for one, too."""
    case = LOSSES["plain mean"]
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)):
        dtype, factor = (torch.float64, float("nan")) if scaler is None else (torch.float32, 1e6)
        model = make_model("mlp").to(dtype)
        before = parameters_of(model)
        batch = make_batch(4, seed=rank)
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        spoilt = {**batch, "y": batch["y"] * (1.0 if rank == 0 else factor)}
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer := sgd(model), 1, gamma=0.5)
        options: dict[str, Any] = {"scaler": scaler, "scheduler": scheduler, "micro_batch_size": 3}
        step = ga.TrainStep(wrapped(model, how), optimizer, case.for_library, **options)
        assert step(spoilt).skipped
        assert_same_gradients(parameters_of(model), before, tolerance=0.0)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert not step(batch).skipped


def every_share(rank: int, world_size: int) -> None:
    """Every way of sharing, with every kind of loss."""
    for how in ("plain", "DDP"):
        check_not_finite(rank, how)
    for shares in SHARES[world_size].values():
        for how in ("plain", "DDP"):
            for loss_name in LOSS_NAMES if world_size == 2 else ("mean over tokens",):
                if loss_name == "terms of their own" and how == "DDP":
                    continue
                check_train_step(rank, make_model("mlp"), loss_name, shares, how, micro_batch_size=4)
            check_train_step(rank, make_model("mlp"), "plain mean", shares, how, micro_batch_size=3, clip_norm=0.1)
        check_train_step(rank, make_model("sparse embedding"), "plain mean", shares, "plain", micro_batch_size=4)
        check_train_step(rank, make_model("mlp"), "mean over tokens", shares, "plain")
        for how in ("plain", "DDP", "DDP, unused", "DDP, static", "DDP, views")[: 5 if world_size == 2 else 1]:
            torch.manual_seed(0)
            check_train_step(rank, Branches().double(), "plain mean", shares, how, micro_batch_size=2)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_share(world_size: int) -> None:
    results_of(every_share, world_size)


def reductions(rank: int, world_size: int) -> None:
    model = make_model("mlp")
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        check_train_step(rank, model, "plain mean", [[8, 8], [8, 8], [8, 8]], "DDP", micro_batch_size=2)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert [call.args[0].numel() for call in all_reduce.call_args_list] == [elements] * 3


def test_gradients_are_reduced_once_an_update() -> None:
    results_of(reductions, 2)
