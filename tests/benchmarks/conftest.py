"""The script that a test file is named after, and what it writes."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import FOLDER, benchmark


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module; helpers of scripts have an underscore before their name."""
    name = Path(request.module.__file__).stem.removeprefix("test_")
    with benchmark(name if (FOLDER / f"{name}.py").exists() else f"_{name}") as module:
        yield module


@pytest.fixture
def results_of(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs the script with arguments, separated by spaces, and reads the file that it wrote."""

    def run(arguments: str) -> Any:
        path = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments.split(), "--json", str(path)])
        script.main()
        return json.loads(path.read_text(encoding="utf-8"))

    return run
