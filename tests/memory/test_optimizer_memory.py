"""Any optimizer's state and temporaries, without a step of it: against its real first step, byte by byte."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gradaccum.memory.live_bytes import LiveBytes
from gradaccum.memory.optimizer_memory import OptimizerMemory, optimizer_memory

Make = Callable[[list[nn.Parameter]], Optimizer]


class Lookahead(Optimizer):
    """An optimizer around another one, with attributes and state of its own, made late."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.slow: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("slow", torch.zeros_like(parameter)).lerp_(parameter, 0.5)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "Adam, all at once": lambda p: torch.optim.Adam(p, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 1e-4}]),
    "with a schedule": lambda p: _scheduled(torch.optim.Adam(p)),
    "around another": lambda p: Lookahead(torch.optim.Adam(p)),
}


def _scheduled(optimizer: Optimizer) -> Optimizer:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def parameters() -> list[nn.Parameter]:
    return list(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).parameters())


def true_memory(optimizer: Optimizer, own: list[nn.Parameter]) -> tuple[int, int]:
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        optimizer.step()
        current = live.current
    return current, live.peak - current


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_first_step(name: str) -> None:
    own = parameters()
    optimizer = OPTIMIZERS[name](own)
    before = [parameter.detach().clone() for parameter in own]
    counted = optimizer_memory([optimizer])
    assert not any(len(state) for state in optimizer.state.values())
    assert all(torch.equal(one, other) for one, other in zip(before, own, strict=True))
    assert all(type(parameter) is nn.Parameter for group in optimizer.param_groups for parameter in group["params"])
    assert all(parameter.grad is None for parameter in own)
    assert counted == OptimizerMemory(*true_memory(optimizer, own))


def test_after_a_step_the_state_is_the_same() -> None:
    own = parameters()
    optimizer = torch.optim.AdamW(own)
    counted = optimizer_memory([optimizer])
    true_memory(optimizer, own)
    steps = [optimizer.state[parameter]["step"].clone() for parameter in own]
    assert optimizer_memory([optimizer]) == counted
    assert steps == [optimizer.state[parameter]["step"] for parameter in own]


def test_several_add_up() -> None:
    first, second = torch.optim.Adam(parameters()), torch.optim.SGD(parameters(), momentum=0.9)
    one, other, both = optimizer_memory([first]), optimizer_memory([second]), optimizer_memory([first, second])
    assert both.state == one.state + other.state
    assert both.step == max(one.step, other.step)


def test_frozen_parameters_have_none_and_sizes_are_rounded() -> None:
    own = parameters()
    own[0].requires_grad_(False)
    assert optimizer_memory([torch.optim.SGD(own, momentum=0.9)]).state == sum(p.nbytes for p in own[1:])
    small = torch.optim.SGD([nn.Parameter(torch.zeros(3))], momentum=0.9)
    assert optimizer_memory([small], rounded_to=512).state == 512


def test_a_step_that_cannot_be_run_is_named() -> None:
    assert optimizer_memory([torch.optim.LBFGS(parameters())]) == OptimizerMemory(0, 0, ("LBFGS",))


def test_hooks_do_not_run() -> None:
    optimizer = torch.optim.Adam(parameters())
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    assert optimizer_memory([optimizer]).unknown == ()


def test_on_cuda_all_parameters_are_taken_at_once() -> None:
    own = parameters()
    here = optimizer_memory([torch.optim.Adam(own)])
    there = optimizer_memory([torch.optim.Adam(own)], device=torch.device("cpu"), as_on_cuda=True)
    assert (here.state, here.step) == (there.state, 40 * 30 * 4 * 2)
    assert there.step == sum(parameter.nbytes for parameter in own)
    for optimizer in (torch.optim.Adam(own, foreach=False), torch.optim.Adam(own, fused=True)):
        assert optimizer_memory([optimizer]) == optimizer_memory([optimizer], as_on_cuda=True)
