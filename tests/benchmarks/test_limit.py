"""The script on a tiny shape: layers written by hand make the textbook loop's updates."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import SINGLE  # fp32 sums in another order, of what the update moved


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.parameters()]).detach()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_layers_written_by_hand_make_the_same_update(rows: int, script: ModuleType) -> None:
    job = sys.modules["gpt"].make_job(script.SHAPES["tiny"], 8)
    for group in job.optimizer.param_groups:
        group["lr"] = 1.0
    start = flat(job.model)
    loop = script.by_hand(job, rows)
    for _ in range(2):  # the second one writes where the first did
        script.textbook(job)()
        loop()
        expected, made = (flat(model) - start for model in (job.model, loop.model))
        assert (made - expected).norm() < SINGLE * expected.norm()


def test_what_is_written(results_of: Callable[[str], Any]) -> None:
    results = results_of("--shape tiny --rounds 1 --together")
    for loops in (results["micro_steps"]["32"], results["time_for_space"]):
        assert all(set(of) == {"seconds", "ratio", "processor_seconds", "processor_ratio"} for of in loops.values())
        assert next(iter(loops.values()))["ratio"] == 1
