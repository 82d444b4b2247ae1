"""The script on the CPU and the smallest shape: what it compares computes the same gradient."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oracle import SINGLE
from scripts import benchmark

CPU = torch.device("cpu")
BF16 = 0.03  # some ten roundings of 2**-9


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with benchmark("gpu") as module:
        yield module


def test_every_way_of_adding_up_is_right(gpu: ModuleType) -> None:
    errors = gpu.errors(gpu.SHAPES["tiny"], CPU)
    assert set(errors) == {"whole batch", *gpu.adding_up(gpu.make_job(gpu.SHAPES["tiny"], CPU, rows=1, tokens=8))}
    assert all(error < BF16 for error in errors.values())
    assert errors["gradaccum, fp32"] <= errors["textbook loop, bf16"]


def test_a_loop_into_zeros_is_the_textbook_loop(gpu: ModuleType) -> None:
    job = gpu.make_job(gpu.SHAPES["tiny"], CPU, rows=1, tokens=8)
    expected = gpu.gradient_of(job, gpu.textbook(job))
    assert gpu.error(gpu.gradient_of(job, gpu.textbook_into_zeros(job)), expected) < SINGLE


def test_what_is_written(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "TOKENS", (32, 64))
    arguments = ["--device", "cpu", "--shapes", "tiny", "--rounds", "1", "--only", "micro-steps", "graphs", "weights"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--json", str(path)])
    gpu.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results["micro_steps"]["tiny"]) == ["32", "64"]
    for found in results["micro_steps"]["tiny"].values():
        assert found["textbook loop"]["ratio"] == 1
        assert found["gradaccum, fused=True"]["difference"] < BF16
        assert all(of["peak_bytes"] > 0 for of in found.values())
    said = capsys.readouterr().out
    assert "CUDA graphs: left out" in said
    assert "weights of any size: left out" in said


def test_without_a_gpu_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()
