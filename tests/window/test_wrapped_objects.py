"""Optimizers and schedulers that frameworks have wrapped: unwrapped where they are known, and else refused by name."""

from typing import Any

import pytest
import torch
from torch import nn

import gradaccum as ga


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(model: nn.Module, optimizer: Any, **options: Any) -> torch.Tensor:
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2, **options)
    for x in accumulator.over(torch.arange(24.0).reshape(8, 3).split(2)):
        accumulator.backward(model(x).square().mean())
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_those_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = made()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    right = trained(model, optimizer, scheduler=scheduler)
    model, optimizer = made()
    accelerator = accelerate.Accelerator(cpu=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert torch.equal(trained(model, optimizer, scheduler=scheduler), right)
    accelerator.free_memory()


def test_those_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which its import sets
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    right = trained(*made())
    model, optimizer = made()
    assert torch.equal(trained(model, core.LightningOptimizer(optimizer)), right)


class Lookahead(torch.optim.Optimizer):
    """As such wrappers are written: it never calls its base class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state, self.defaults = optimizer.state, {}

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("kind", [ga.Accumulator, ga.TrainStep])
def test_a_wrapper_that_is_not_known(kind: Any) -> None:
    model, optimizer = made()
    with pytest.raises(
        ga.ParameterError, match=r"Lookahead wraps a AdamW.*Pass the optimizer inside.*optimizer\.optimizer"
    ):
        kind(
            model,
            Lookahead(optimizer),
            **({"micro_batches": 2} if kind is ga.Accumulator else {"loss_fn": lambda m, b: 0}),
        )


class Timms:
    def step(self, epoch: int) -> None: ...

    def step_update(self, num_updates: int) -> None: ...


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Timms(), r"Timms\.step\(epoch.*needs arguments.*step_update"),
        ("cosine", r"scheduler=str: it has no step\(\)"),
        ({"scheduler": object(), "interval": "step"}, r"scheduler=dict.*The one inside of it"),
    ],
    ids=["timm", "a name", "Lightning's dict"],
)
def test_a_scheduler_that_cannot_be_advanced(scheduler: Any, message: str) -> None:
    with pytest.raises(ga.ParameterError, match=f"(?s){message}"):
        ga.Accumulator(*made(), micro_batches=2, scheduler=scheduler)


def test_numpy_columns_are_tensors_in_micro_batches() -> None:
    numpy = pytest.importorskip("numpy")
    model, optimizer = made()
    read_only = numpy.arange(4.0, dtype="float32")
    read_only.setflags(write=False)
    batch = {"x": numpy.ones((4, 3), dtype="float32")[::-1], "y": read_only, "names": numpy.array(list("abcd"))}
    kinds = []

    def loss_fn(model: Any, part: Any) -> torch.Tensor:
        kinds.append({name: type(value).__name__ for name, value in part.items()})
        return (model(part["x"]).squeeze(1) - part["y"]).square().mean()

    ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=2)(batch)
    assert kinds == [{"x": "Tensor", "y": "Tensor", "names": "ndarray"}] * 2
