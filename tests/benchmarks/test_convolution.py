"""The script on few and small pictures: its loops give the whole batch's gradient."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oracle import EXACT, SINGLE
from scripts import benchmark


@pytest.fixture(scope="module")
def convolution() -> Iterator[ModuleType]:
    with benchmark("convolution") as module:
        yield module


@pytest.mark.parametrize("rows", [16, 24])
def test_every_loop_gives_the_whole_batchs_gradient(rows: int, convolution: ModuleType) -> None:
    torch.set_default_dtype(torch.float64)
    job = convolution.make_job(rows, side=8)
    exact = convolution.exact_gradient(job)
    loops = convolution.loops_of(job, with_peers=False) | convolution.sizes_of(job)
    for name, loop in loops.items():
        assert convolution.error(convolution.gradient_of(job, loop), exact) < EXACT, name


def test_what_is_written(
    convolution: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "convolution.json"
    arguments = ["--rows", "16", "--side", "8", "--rounds", "1", "--no-peers", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["convolution.py", *arguments])
    convolution.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    assert all(of["error"] < SINGLE for of in results["loops"].values())
    assert results["loops"]["textbook loop"]["ratio"] == results["sizes"]["16"]["ratio"] == 1
    assert list(results["sizes"]) == ["16", "1", "2", "4", "8"]
    assert all(1 <= size <= 16 for size in results["auto"])
    assert "error of the gradient" in capsys.readouterr().out
