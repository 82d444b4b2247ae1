"""``gradaccum bench``: what it prints and what it writes. How fast anything is, is not tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradaccum.cli import bench

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (bench.Case(name="tiny", width=2, layers=1, rows=3, updates=1, rounds=2),)
    monkeypatch.setattr(bench.run_bench, "__kwdefaults__", {"cases": cases})


def test_a_table(gradaccum: Command) -> None:
    done = gradaccum("bench")
    assert (done.status, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    (row,) = [line.split() for line in done.out.splitlines() if line.strip().startswith("tiny")]
    assert len(row) == 4


def test_figures(gradaccum: Command, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = gradaccum("bench", "--json", path)
    assert done.status == 0
    assert "Figures: " in done.out
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(figures) == {"machine", "versions", "jobs"}
    assert set(figures["jobs"]["tiny"]) == {"textbook_seconds", "gradaccum_seconds", "ratio"}
