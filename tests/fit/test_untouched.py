"""Planning leaves nothing but the plan: tensors, gradients, states and flags are as they were, bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from architectures import classes_loss, planned, rows_of_8

METHODS = ("measure", "estimate")


class Everything(nn.Module):
    """Normalises, drops out, caches, and writes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
        self.average = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(8)
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1)
        return self.body(x * self.mask)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_all_is_left_as_it_was(method: str, raises: bool) -> None:
    model = Everything()
    model.body[1].momentum = 0.3
    optimizer = torch.optim.AdamW(model.parameters())
    classes_loss(model, rows_of_8()).backward()
    optimizer.step()  # the state is there; gradients stay
    model.mask = None
    data = rows_of_8()

    def loss_fn(model: Any, micro_batch: Any) -> Tensor:
        loss = classes_loss(model, micro_batch)
        if raises and len(micro_batch[0]) > 4:
            raise LookupError("of the user's own")
        micro_batch[0].zero_()  # its own micro-batch, not the user's batch
        torch.rand(3)
        return loss

    def state() -> list[Any]:
        tensors = [*model.state_dict(keep_vars=True).values(), *data]
        gradients = [parameter.grad for parameter in model.parameters()]
        values = [*tensors, *(gradient for gradient in gradients if gradient is not None)]
        per_parameter = [entry for one in optimizer.state.values() for entry in one.values()]
        flags = [module.training for module in model.modules()]
        ids = [id(tensor) for tensor in [*tensors, *gradients, *per_parameter]]
        bits = [value.detach().clone() for value in [*values, *per_parameter, torch.get_rng_state()]]
        return [ids, flags, bits]

    before = state()
    if raises:
        with pytest.raises(LookupError, match="of the user's own"):
            planned(model, loss_fn, data, optimizer=optimizer, method=method)
    else:
        assert planned(model, loss_fn, data, optimizer=optimizer, method=method).method == method
    after = state()
    assert before[:2] == after[:2]
    assert all(torch.equal(one, other) for one, other in zip(before[2], after[2], strict=True))
    assert model.mask is None
    model(torch.randn(4, 8)).sum().backward()  # no fake tensor is left anywhere


def test_a_training_run_does_not_notice() -> None:
    def trained(*, plans: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Everything()
        optimizer = torch.optim.Adam(model.parameters())
        train_step = ga.TrainStep(model, optimizer, classes_loss, micro_batch_size=16)
        for _ in range(3):
            data = rows_of_8()
            train_step(data)
            if plans:
                for method in METHODS:
                    planned(model, classes_loss, data, optimizer=optimizer, method=method)
        return [tensor.clone() for tensor in model.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(trained(plans=False), trained(plans=True), strict=True))
