"""The script on the CPU and the smallest shape: what it compares computes the same gradient."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from oracle import SINGLE

CPU = torch.device("cpu")
BF16 = 0.03  # some ten roundings of 2**-9


def test_every_way_of_adding_up_is_right(script: ModuleType) -> None:
    errors = script.errors(script.SHAPES["tiny"], CPU)
    assert set(errors) == {
        "whole batch",
        *script.adding_up(script.make_job(script.SHAPES["tiny"], CPU, rows=1, tokens=8)),
    }
    assert all(error < BF16 for error in errors.values())
    assert errors["gradaccum, fp32"] <= errors["textbook loop, bf16"]


def test_a_loop_into_zeros_is_the_textbook_loop(script: ModuleType) -> None:
    job = script.make_job(script.SHAPES["tiny"], CPU, rows=1, tokens=8)
    expected = script.gradient_of(job, script.textbook(job))
    assert script.error(script.gradient_of(job, script.textbook_into_zeros(job)), expected) < SINGLE


def test_what_is_written(
    script: ModuleType,
    results_of: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "TOKENS", (32, 64))
    results = results_of("--device cpu --shapes tiny --rounds 1 --only micro-steps graphs weights")
    assert list(results["micro_steps"]["tiny"]) == ["32", "64"]
    for found in results["micro_steps"]["tiny"].values():
        assert found["textbook loop"]["ratio"] == 1
        assert found["gradaccum, fused=True"]["difference"] < BF16
        assert all(of["peak_bytes"] > 0 for of in found.values())
    said = capsys.readouterr().out
    assert "CUDA graphs: left out" in said
    assert "weights of any size: left out" in said


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no GPU here"):
        script.main()
