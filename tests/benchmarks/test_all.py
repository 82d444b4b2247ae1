"""Every script is run by the one command, and what it leaves is drawn."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import FOLDER


def test_every_script_is_run(script: ModuleType) -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert {run.name for run in script.RUNS} == scripts - {"all", "plot"}


def test_what_is_typed(script: ModuleType) -> None:
    runs, folder = (script.Run(name="gpt", full="--rounds 3", quick="--rounds 1 --tokens 32"),), Path("a")
    assert script.commands(runs, folder, is_quick=False) == {
        "gpt": ["benchmarks/gpt.py", "--rounds", "3", "--json", "a/gpt.json"]
    }
    assert script.commands(runs, folder, is_quick=True) == {
        "gpt": ["benchmarks/gpt.py", "--rounds", "1", "--tokens", "32", "--json", "a/gpt.json"]
    }


def test_what_is_on_file_is_of_the_script_of_that_name(script: ModuleType) -> None:
    for path in (FOLDER / "results").glob("*.json"):
        assert path.stem in {run.name for run in script.RUNS}
        on_file = json.loads(path.read_text(encoding="utf-8"))["command"].split()
        assert on_file[:2] == ["python", f"benchmarks/{path.stem}.py"]


@pytest.mark.parametrize(
    ("options", "has_gpu", "says"),
    [({"needs": ("nobody_has_this",)}, True, "needs nobody_has_this: pip install"), ({}, False, None),
     ({"needs_gpu": True}, False, "needs a GPU"), ({"needs_gpu": True}, True, None)],
)  # fmt: skip
def test_what_cannot_be_run_says_why(
    options: dict[str, Any], has_gpu: bool, says: str | None, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: has_gpu)
    obstacle = script.Run(name="a", **options).obstacle()
    assert obstacle is None if says is None else obstacle.startswith(says)


def test_a_failure_stops_nothing_and_is_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        typed.append(command[1])
        return subprocess.CompletedProcess(command, returncode=command[1] == "benchmarks/peak.py")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "peak", "overhead", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: peak"):
        script.main()
    assert typed == ["benchmarks/overhead.py", "benchmarks/peak.py", "benchmarks/plot.py"]
    assert "[2/2, 0 min] benchmarks/peak.py" in capsys.readouterr().out
