"""Every script in examples/ runs, warns of nothing, checks its own claim, and fits on a page or two."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
MAX_LINES = 100
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # for those that say so
SECONDS_TO_RUN = 240
CHECKS = ("assert_close", "assert_equal", "assert_exact", "allclose")


def complaints(path: Path, *, folder: Path) -> list[str]:
    """What is wrong with one example; it is run in `folder`."""
    text = path.read_text(encoding="utf-8")
    found: list[str] = []
    num_lines = len(text.splitlines())
    if num_lines > MAX_LINES:
        found.append(f"{num_lines} lines, at most {MAX_LINES}")
    if not any(_is_check(node) for node in ast.walk(ast.parse(text))):
        found.append("it asserts nothing")
    # A script finds its neighbours through its own folder: nothing else is put on the path.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, *(TORCHRUN if "torchrun" in text else ()), str(path)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_RUN
        )
    except subprocess.TimeoutExpired:
        return [*found, f"it still ran after {SECONDS_TO_RUN} s"]
    if done.returncode:
        found.append(f"exit status {done.returncode}:\n{done.stderr}")
    elif "Warning: " in done.stderr:
        found.append(f"it warns:\n{done.stderr}")
    return found


def _is_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(CHECKS))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path) -> None:
    assert complaints(path, folder=tmp_path) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        pytest.param("assert 1 + 1 == 2", None, id="fine"),
        pytest.param("assert 1 + 1 == 3", "exit status 1:", id="wrong"),
        pytest.param("print('looks good')", "it asserts nothing", id="no check"),
        pytest.param("import warnings\nassert True\nwarnings.warn('careful')", "it warns:", id="warns"),
        pytest.param("\n" * MAX_LINES + "assert True", "101 lines, at most 100", id="long"),
    ],
)
def test_the_example_guard(tmp_path: Path, source: str, complaint: str | None) -> None:
    path = tmp_path / "example.py"
    path.write_text(source, encoding="utf-8")
    found = [text.splitlines()[0] for text in complaints(path, folder=tmp_path)]
    assert found == ([complaint] if complaint else [])
