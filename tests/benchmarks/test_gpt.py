"""The script on a tiny shape: its loops make the same update, and what it writes is what is read elsewhere."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from oracle import SINGLE  # fp32 sums in another order, of what the update moved


def test_the_shape_is_gpt_2s(script: ModuleType) -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in script.GPT(shape).parameters()) for name, shape in script.SHAPES.items()}
    assert sizes["124M"] == 124_439_808
    assert sizes["1B"] == pytest.approx(1e9, rel=0.02)


@pytest.mark.parametrize("kind", ["MICRO_STEPS", "TIME_FOR_SPACE"])
def test_all_loops_make_the_same_update(kind: str, script: ModuleType) -> None:
    job = script.make_job(script.SHAPES["tiny"], 8)
    start = {name: value.clone() for name, value in job.model.state_dict().items()}
    for group in job.optimizer.param_groups:
        group["lr"] = 1.0
    moved = []
    for make in getattr(script, kind).values():
        make(job)()
        moved.append(torch.cat([(start[n] - value).flatten() for n, value in job.model.named_parameters()]).detach())
        job.model.load_state_dict(start)
    assert moved[0].norm() > 0
    for other in moved[1:]:
        assert (other - moved[0]).norm() < SINGLE * moved[0].norm()


def test_gradients_agree(script: ModuleType) -> None:
    assert script.gradient_difference(script.make_job(script.SHAPES["tiny"], 8)) < SINGLE


def test_what_is_written(results_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of("--shape tiny --tokens 8 --rounds 1 --no-peers --together")
    assert list(results["micro_steps"]) == ["8"]
    for loops in (results["micro_steps"]["8"], results["time_for_space"]):
        assert all(set(of) == {"seconds", "ratio", "processor_seconds", "processor_ratio"} for of in loops.values())
        assert next(iter(loops.values()))["ratio"] == 1
    assert 0 < results["own_python"]["8"] < 1
    assert "8 micro-batches of 8 tokens" in capsys.readouterr().out
