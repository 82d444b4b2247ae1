"""The script on a tiny shape: layers written by hand make the textbook loop's updates."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from scripts import benchmark

SINGLE = 1e-5  # fp32 sums in another order, of what the updates moved


@pytest.fixture(scope="module")
def limit() -> Iterator[ModuleType]:
    with benchmark("limit") as module:
        yield module


@pytest.fixture(scope="module")
def gpt(limit: ModuleType) -> ModuleType:
    return sys.modules["gpt"]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.parameters()]).detach()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_layers_written_by_hand_make_the_same_update(rows: int, limit: ModuleType, gpt: ModuleType) -> None:
    job = gpt.make_job(limit.SHAPES["tiny"], 8)
    for group in job.optimizer.param_groups:
        group["lr"] = 1.0
    start = flat(job.model)
    loop = limit.by_hand(job, rows)
    for _ in range(2):  # the second one writes where the first did
        limit.textbook(job)()
        loop()
        expected, made = (flat(model) - start for model in (job.model, loop.model))
        assert (made - expected).norm() < SINGLE * expected.norm()


def test_what_is_written(limit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "limit.json"
    monkeypatch.setattr(
        sys, "argv", ["limit.py", "--shape", "tiny", "--rounds", "1", "--together", "--json", str(path)]
    )
    limit.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    for loops in (results["micro_steps"]["32"], results["time_for_space"]):
        assert all(set(of) == {"seconds", "ratio", "processor_seconds", "processor_ratio"} for of in loops.values())
        assert next(iter(loops.values()))["ratio"] == 1
