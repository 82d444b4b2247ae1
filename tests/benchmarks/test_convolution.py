"""The script on few and small pictures: its loops give the whole batch's gradient."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from oracle import EXACT, SINGLE


@pytest.mark.parametrize("rows", [16, 24])
def test_every_loop_gives_the_whole_batchs_gradient(rows: int, script: ModuleType) -> None:
    torch.set_default_dtype(torch.float64)
    job = script.make_job(rows, side=8)
    exact = script.exact_gradient(job)
    loops = script.loops_of(job, with_peers=False) | script.sizes_of(job)
    for name, loop in loops.items():
        assert script.error(script.gradient_of(job, loop), exact) < EXACT, name


def test_what_is_written(results_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of("--rows 16 --side 8 --rounds 1 --no-peers")
    assert all(of["error"] < SINGLE for of in results["loops"].values())
    assert results["loops"]["textbook loop"]["ratio"] == results["sizes"]["16"]["ratio"] == 1
    assert list(results["sizes"]) == ["16", "1", "2", "4", "8"]
    assert all(1 <= size <= 16 for size in results["auto"])
    assert "error of the gradient" in capsys.readouterr().out
