"""The script on a tiny shape: its loops make the same update, and what it writes is what is read elsewhere."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import benchmark

SINGLE = 1e-5  # fp32 sums in another order, of what the update moved


@pytest.fixture(scope="module")
def gpt() -> Iterator[ModuleType]:
    with benchmark("gpt") as module:
        yield module


def test_the_shape_is_gpt_2s(gpt: ModuleType) -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in gpt.GPT(shape).parameters()) for name, shape in gpt.SHAPES.items()}
    assert sizes["124M"] == 124_439_808
    assert sizes["1B"] == pytest.approx(1e9, rel=0.02)


@pytest.mark.parametrize("kind", ["MICRO_STEPS", "TIME_FOR_SPACE"])
def test_all_loops_make_the_same_update(kind: str, gpt: ModuleType) -> None:
    job = gpt.make_job(gpt.SHAPES["tiny"], 8)
    start = {name: value.clone() for name, value in job.model.state_dict().items()}
    for group in job.optimizer.param_groups:
        group["lr"] = 1.0
    moved = []
    for make in getattr(gpt, kind).values():
        make(job)()
        moved.append(torch.cat([(start[n] - value).flatten() for n, value in job.model.named_parameters()]).detach())
        job.model.load_state_dict(start)
    assert moved[0].norm() > 0
    for other in moved[1:]:
        assert (other - moved[0]).norm() < SINGLE * moved[0].norm()


def test_gradients_agree(gpt: ModuleType) -> None:
    assert gpt.gradient_difference(gpt.make_job(gpt.SHAPES["tiny"], 8)) < SINGLE


def test_what_is_written(
    gpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpt.json"
    arguments = ["--shape", "tiny", "--tokens", "8", "--rounds", "1", "--no-peers", "--together", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["gpt.py", *arguments])
    gpt.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results["micro_steps"]) == ["8"]
    for loops in (results["micro_steps"]["8"], results["time_for_space"]):
        assert all(set(of) == {"seconds", "ratio", "processor_seconds", "processor_ratio"} for of in loops.values())
        assert next(iter(loops.values()))["ratio"] == 1
    assert 0 < results["own_python"]["8"] < 1
    assert "8 micro-batches of 8 tokens" in capsys.readouterr().out
