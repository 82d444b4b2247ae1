"""The script on few pairs: all ways that promise the whole batch's gradient give it, and the textbook loop does not."""

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
def contrastive() -> Iterator[ModuleType]:
    with benchmark("contrastive") as module:
        yield module


def test_ways_over_the_whole_batch_are_exact(
    contrastive: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contrastive, "is_installed", lambda *_: False)
    torch.set_default_dtype(torch.float64)
    job = contrastive.make_job(20, tokens=4)  # pieces of 8, 8 and 4 pairs
    exact, loops = contrastive.exact_gradient(job), contrastive.loops_of(job)
    errors = {name: contrastive.error(contrastive.gradient_of(job, loop), exact) for name, loop in loops.items()}
    assert errors.pop("textbook loop") > 0.1
    assert all(error < EXACT for error in errors.values()), errors


def test_sentence_transformers_is_exact_too(contrastive: ModuleType) -> None:
    pytest.importorskip("sentence_transformers")
    torch.set_default_dtype(torch.float64)
    job = contrastive.make_job(20, tokens=4)
    gradient = contrastive.gradient_of(job, contrastive.sentence_transformers(job))
    assert contrastive.error(gradient, contrastive.exact_gradient(job)) < EXACT


def test_what_is_written(
    contrastive: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "contrastive.json"
    monkeypatch.setattr(contrastive, "is_installed", lambda *_: False)
    monkeypatch.setattr(
        sys, "argv", ["contrastive.py", "--pairs", "16", "--tokens", "4", "--rounds", "1", "--json", str(path)]
    )
    contrastive.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["loops"][results["base"]]["ratio"] == 1
    assert results["loops"]["gradaccum, none kept"]["error"] < SINGLE < results["loops"]["textbook loop"]["error"]
    assert all(of["peak_bytes"] > 0 for of in results["loops"].values())
    assert "16 pairs in mini-batches of 8" in capsys.readouterr().out
