"""The script on few pairs: all ways that promise the whole batch's gradient give it, and the textbook loop does not."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from oracle import EXACT, SINGLE


def test_ways_over_the_whole_batch_are_exact(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "is_installed", lambda *_: False)
    torch.set_default_dtype(torch.float64)
    job = script.make_job(20, tokens=4)  # pieces of 8, 8 and 4 pairs
    exact, loops = script.exact_gradient(job), script.loops_of(job)
    errors = {name: script.error(script.gradient_of(job, loop), exact) for name, loop in loops.items()}
    assert errors.pop("textbook loop") > 0.1
    assert all(error < EXACT for error in errors.values()), errors


def test_sentence_transformers_is_exact_too(script: ModuleType) -> None:
    pytest.importorskip("sentence_transformers")
    torch.set_default_dtype(torch.float64)
    job = script.make_job(20, tokens=4)
    gradient = script.gradient_of(job, script.sentence_transformers(job))
    assert script.error(gradient, script.exact_gradient(job)) < EXACT


def test_what_is_written(
    script: ModuleType,
    results_of: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "is_installed", lambda *_: False)
    results = results_of("--pairs 16 --tokens 4 --rounds 1")
    assert results["loops"][results["base"]]["ratio"] == 1
    assert results["loops"]["gradaccum, none kept"]["error"] < SINGLE < results["loops"]["textbook loop"]["error"]
    assert all(of["peak_bytes"] > 0 for of in results["loops"].values())
    assert "16 pairs in mini-batches of 8" in capsys.readouterr().out
