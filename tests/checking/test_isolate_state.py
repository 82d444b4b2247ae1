"""An audit leaves nothing behind: model, buffers, gradients, batch and random state are as they were, bit by bit."""

import logging
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
import zoo


class Everything(nn.Module):
    """Normalises, drops out, caches, counts, and writes a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = zoo.mlp(nn.BatchNorm1d(8), nn.Dropout(0.5), zoo.BatchAttention())
        self.average = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.mask: Tensor | None = None
        self.calls = [0]
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(6, dtype=x.dtype)
        self.calls[0] += 1
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1)
        return self.body(x * self.mask + 0.01 * torch.randn(x.shape, generator=self.generator))


@pytest.mark.parametrize("raises", [False, True])
def test_all_is_left_as_it_was(raises: bool) -> None:
    model = Everything()
    batch = zoo.vectors()
    temperature = nn.Parameter(torch.ones(()))  # of the loss, and not handed over
    zoo.classes(model, batch).backward()
    model.mask = None
    numpy = pytest.importorskip("numpy")
    calls = 0

    def loss_fn(model: Any, micro_batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = zoo.mixup(model, micro_batch) * temperature
        micro_batch[0].zero_()  # its own micro-batch, not the user's batch
        random.random()
        if raises and calls > 4:
            raise LookupError("of the user's own")
        return loss

    def state() -> list[Any]:
        gradients = [parameter.grad for parameter in [*model.parameters(), temperature]]
        tensors = [*model.state_dict(keep_vars=True).values(), *batch, *gradients]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        ids = [id(tensor) for tensor in tensors]
        bits = [tensor.detach().clone() for tensor in tensors if tensor is not None]
        generators = [torch.get_rng_state(), model.generator.get_state()]
        other = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_default_dtype(), warnings.filters]
        other += [logging.getLogger("gradaccum").disabled, *(sorted(vars(module)) for module in model.modules())]
        return [ids, hooks, list(model.calls), other, [*bits, *generators]]

    before = state()
    if raises:
        with pytest.raises(ga.BatchError, match=r"pieces do not .*of the user's own"):
            ga.audit(model, loss_fn, batch, 4)
    else:
        assert not ga.audit(model, loss_fn, batch, 4).exact
    after = state()

    assert before[:-1] == after[:-1]
    assert all(torch.equal(one, other) for one, other in zip(before[-1], after[-1], strict=True))
    assert model.mask is None
    assert calls > 4


def test_a_training_run_does_not_notice() -> None:
    def trained(*, audits: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = zoo.mlp(nn.BatchNorm1d(8), nn.Dropout(0.5))
        optimizer = torch.optim.Adam(model.parameters())
        train_step = ga.TrainStep(model, optimizer, zoo.classes, micro_batch_size=16)
        for _ in range(3):
            batch = zoo.vectors()
            train_step(batch)
            if audits:
                ga.audit(model, zoo.classes, batch, 4)
        return [tensor.clone() for tensor in model.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(trained(audits=False), trained(audits=True), strict=True))
