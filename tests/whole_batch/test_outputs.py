"""What forward may return besides tensors: numbers add up under combine="sum", other things are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


X = torch.randn(17, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(17) % 3


def step(model: Any, forward: Any, batch_loss: Any, **options: Any) -> ga.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss, **options)


def statistics(model: Any, batch: Any) -> dict[str, Any]:
    """A mean over samples and a moment, of sums, a count and a number of seconds."""
    z = model(batch[0])
    return {
        "ce": F.cross_entropy(z, batch[1], reduction="sum"),
        "n": len(z),
        "seconds": 0.1 * len(z),
        "more": [z.square().sum(0), None],
    }


def loss(found: dict[str, Any], batch: Any) -> Tensor:
    return found["ce"] / found["n"] + (found["more"][0] / found["seconds"]).square().sum()


@pytest.mark.parametrize("options", [{}, {"kept_graphs": 0}, {"lockstep": True}], ids=repr)
@pytest.mark.parametrize("size", [17, 7, 5, 1])
def test_numbers_add_up(options: dict[str, Any], size: int) -> None:
    model, twin = net(), net()
    found = step(model, statistics, loss, combine="sum", micro_batch_size=size, **options).backward((X, Y))
    whole = loss(statistics(twin, (X, Y)), (X, Y))
    whole.backward()
    assert abs(float(found.value) - whole.item()) < 1e-12
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", [True, "name", [1, 2, 3], 1j], ids=repr)
def test_what_does_not_add_up_is_refused(other: Any) -> None:
    def forward(model: Any, batch: Any) -> dict[str, Any]:
        return {"ce": F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), "other": other}

    for size in (5, 17):
        train_step = step(net(), forward, lambda found, batch: found["ce"], combine="sum", micro_batch_size=size)
        with pytest.raises(ga.BatchError, match=r"among its statistics.*first one's alone\. Return tensors and"):
            train_step((X, Y))


def test_numbers_that_differ_are_refused_where_outputs_are_joined() -> None:
    def forward(model: Any, batch: Any) -> dict[str, Any]:
        return {"z": model(batch[0]), "n": len(batch[0]), "temperature": 0.5}

    def batch_loss(found: dict[str, Any], batch: Any) -> Tensor:
        return F.cross_entropy(found["z"] / found["temperature"], batch[1])

    with pytest.raises(ga.BatchError, match=r"5 for one micro-batch and 6 for another|6 .* and 5 "):
        step(net(), forward, batch_loss, micro_batch_size=6)((X, Y))
    both = step(net(), lambda m, b: {"z": m(b[0]), "temperature": 0.5}, batch_loss, micro_batch_size=6)
    assert both((X, Y)).micro_batches == 3
