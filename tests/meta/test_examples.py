"""Every script in examples/ runs, warns of nothing, checks its own claim, and is short. So is the notebook."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NOTEBOOK = FOLDER / "tour.ipynb"
MAX_LINES = 100
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # for those that say so
SECONDS_TO_RUN = 240
CHECKS = ("assert_close", "assert_equal", "assert_exact", "allclose")


def complaints(path: Path, *, folder: Path, max_lines: int = MAX_LINES) -> list[str]:
    """What is wrong with one example; it is run in `folder`."""
    text = path.read_text(encoding="utf-8")
    found: list[str] = []
    num_lines = len(text.splitlines())
    if num_lines > max_lines:
        found.append(f"{num_lines} lines, at most {max_lines}")
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


def test_the_cells_of_the_notebook(tmp_path: Path) -> None:
    """As one script: the kernel of a notebook need not be here."""
    pytest.importorskip("matplotlib", reason="the notebook draws")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    path = tmp_path / "tour.py"
    path.write_text("\n\nplt.close('all')\n".join(code), encoding="utf-8")  # as a notebook does after each
    assert complaints(path, folder=tmp_path, max_lines=2 * MAX_LINES) == []
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3, "plots are to be seen without running"
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


def test_the_notebook_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ipykernel", "matplotlib"):
        pytest.importorskip(module, reason="a notebook runs where there is a kernel: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=SECONDS_TO_RUN, resources={"metadata": {"path": str(FOLDER)}}).execute()


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
