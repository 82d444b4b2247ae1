"""Ranges by stage stand in a profile, and nothing of them is left without a profiler."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import gradaccum as ga
from wrapping import sgd


def ranges(run: Any) -> Counter[str]:
    with profile() as profiled:
        run()
    return Counter({one.key: one.count for one in profiled.key_averages() if one.key.startswith("gradaccum.")})


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("options", [{}, {"randomness": "sample"}], ids=str)
def test_of_a_batch_in_hand(options: dict[str, Any]) -> None:
    model = nn.Linear(3, 1)
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=3, **options)
    step(torch.randn(7, 3))
    found = ranges(lambda: step(torch.randn(7, 3)))
    assert found == {"gradaccum.forward": 3, "gradaccum.backward": 3, "gradaccum.step": 1}
    step(torch.randn(7, 3))
    assert not {"_run_backward", "push"} & vars(step._accumulation).keys(), "what a profiler had is gone"


def test_of_a_loss_over_the_whole_batch() -> None:
    model = nn.Linear(3, 1)
    step = ga.TrainStep(
        model, sgd(model), forward=lambda m, x: m(x), batch_loss=lambda out, _: out.std(), micro_batch_size=3
    )
    step(torch.randn(7, 3))
    found = ranges(lambda: step(torch.randn(7, 3)))
    assert found["gradaccum.forward"] >= 3
    assert found["gradaccum.backward"] >= 1
    assert found["gradaccum.step"] == 1


def test_of_a_loop_of_ones_own() -> None:
    model = nn.Linear(3, 1)
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=2)

    def run() -> None:
        for x in accumulator.over(torch.randn(5, 2, 3).unbind()):
            accumulator.backward(loss_fn(model, x))

    assert ranges(run) == {"gradaccum.backward": 5, "gradaccum.step": 3}
