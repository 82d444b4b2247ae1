"""Losses and layers over the whole batch, where the batch is spread over processes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from coupled import COUPLED, Batch, Temperature, model_for
from normed import classes_loss, make_batches, make_network
from oracle import assert_same_gradients, gradients_of
from ranks import results_of, run_ranks
from tasks import pieces
from wrapping import full_tensor, sgd, sharded, wrapped

EXACT = 1e-10  # of the largest component
SHARES = {2: [[7, 6], [12, 1], [13, 0], [0, 13]], 3: [[6, 2, 5], [0, 4, 9]], 4: [[3, 0, 9, 1]]}


def check_losses(rank: int, world_size: int, how: str) -> list[float]:
    """Every coupled loss, with shares of every kind, against one process with the whole batch."""
    losses: list[float] = []
    for name, case in COUPLED.items():
        for shares in SHARES[world_size]:
            model = model_for(case)
            loss_module: Any = Temperature() if name == "contrastive" else None
            batch_loss = case.batch_loss if loss_module is None else loss_module
            twin, twin_loss = copy.deepcopy((model, batch_loss))
            expected = twin_loss(case.forward(twin, case.batch), case.batch)
            expected.backward()
            owned = [] if loss_module is None else list(loss_module.parameters())
            replicas = {"FSDP2": 1, "HSDP": 2}.get(how)
            trained = wrapped(model, how) if replicas is None else sharded(model, world_size, replicas=replicas)
            optimizer = torch.optim.SGD([*model.parameters(), *owned], lr=0.1)
            options: dict[str, Any] = {"combine": case.combine, "micro_batch_size": 3, "kept_graphs": 1}
            step = ga.TrainStep(trained, optimizer, forward=case.forward, batch_loss=batch_loss, **options)
            own = pieces(case.batch, shares)[rank]
            loss = step.backward(own)
            gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
            assert_same_gradients(gradients, gradients_of(twin), tolerance=EXACT, where=f"{name} {shares} ")
            if loss_module is not None:
                assert_same_gradients(gradients_of(loss_module), gradients_of(twin_loss), tolerance=EXACT)
                loss_module.zero_grad()
            torch.testing.assert_close(loss.value, expected.detach(), rtol=EXACT, atol=EXACT)
            model.zero_grad()
            update = step(own)
            assert (update.samples, update.weight) == (13, 13)
            losses.append(float(update.loss))
    return losses


def check_batch_norm(rank: int, world_size: int, how: str) -> None:
    """A residual network whose statistics are those of all processes' samples, over several updates."""
    model = make_network("residual")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1)
    step = ga.TrainStep(wrapped(model, how), optimizer, classes_loss, batch_norm="exact", micro_batch_size=3)
    several = {2: [[7, 6], [12, 1], [1, 12]], 3: [[6, 2, 5], [1, 11, 1]], 4: [[3, 1, 8, 1], [4, 3, 3, 3]]}[world_size]
    for shares, batch in zip(several, make_batches(len(several), 13), strict=True):
        update = step(tuple(part.split(shares)[rank] for part in batch))
        reference.zero_grad()
        expected = classes_loss(twin, batch)
        expected.backward()
        reference.step()
        torch.testing.assert_close(update.loss, expected.detach(), rtol=EXACT, atol=EXACT)
        for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT, msg=name)


@pytest.mark.parametrize(
    ("world_size", "how"), [(2, "plain"), (2, "DDP"), (3, "DDP"), (4, "DDP"), (2, "FSDP2"), (4, "HSDP")]
)
def test_losses_over_the_outputs_of_all(world_size: int, how: str) -> None:
    first, *others = results_of(check_losses, world_size, how)
    assert all(other == first for other in others)


@pytest.mark.parametrize(("world_size", "how"), [(2, "plain"), (2, "DDP"), (3, "DDP"), (4, "DDP")])
def test_batch_norm_over_the_samples_of_all(world_size: int, how: str) -> None:
    results_of(check_batch_norm, world_size, how)


def fails_on_one(rank: int, world_size: int, what: str) -> None:
    """One process raises in the middle, or has nothing to exchange."""
    if what == "no samples":
        network = make_network("residual")
        step = ga.TrainStep(network, sgd(network), classes_loss, batch_norm="exact")
        step(tuple(part.split([5, 0])[rank] for part in make_batches(1, 5)[0]))
        return
    case = COUPLED["triplet"]
    model = model_for(case)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        if rank == 1:
            raise ValueError("rank 1 has had enough")
        return case.forward(model, batch)

    step = ga.TrainStep(model, sgd(model), forward=forward, batch_loss=case.batch_loss, micro_batch_size=3)
    step(pieces(case.batch, [6, 7])[rank])


@pytest.mark.parametrize(
    ("what", "message"), [("raises", "rank 1 has had enough"), ("no samples", "every process needs at least one")]
)
def test_one_that_fails_is_named_by_the_others(what: str, message: str) -> None:
    fine, failed = run_ranks(fails_on_one, 2, what)
    assert fine.status
    assert failed.status
    assert "RankError" in fine.stderr
    assert message in fine.stderr
    assert message in failed.stderr
