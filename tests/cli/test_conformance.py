"""``gradaccum conformance`` on an adapter of the user's own, and the option of pytest."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradaccum.cli.conformance import trainer_of
from gradaccum.conformance import scenario, suite, verdicts

Command = Callable[..., Any]

# The adapter of docs/conformance.md.
SOURCE = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
ADAPTER = "import torch\n" + SOURCE.split("```python\n")[1].split("```")[0]
SHORT = ("equal micro-batches, full windows", "short last window", "BatchNorm", "skipped update")


@pytest.fixture(autouse=True)
def _few_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "scenarios", lambda: tuple(scenario(name) for name in SHORT))


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_training.py"
    path.write_text(ADAPTER, encoding="utf-8")
    yield path
    sys.modules.pop("my_training", None)


def test_the_pages_adapter_is_short() -> None:
    assert len(ADAPTER.splitlines()) < 20


def test_an_adapter_in_a_file(gradaccum: Command, adapter: Path) -> None:
    done = gradaccum("conformance", f"{adapter}:train")
    assert (done.status, done.err) == (1, "")
    assert "train is exact in 1 of 3." in done.text
    assert "train: short last window off by 6.3e-02. What it does: each micro-batch's loss is divided by" in done.text
    assert f"train = runpy.run_path({str(adapter)!r})['train']" in done.out
    assert "The difficulty: BatchNorm's statistics are those of a micro-batch." in done.text


def test_the_reproduction_of_a_file_runs(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verdicts.judge(scenario("short last window"), trainer_of(f"{adapter}:train"))
    assert len(verdict.reproduction) == 5
    exec("\n".join(verdict.reproduction), {})
    assert float(capsys.readouterr().out) == pytest.approx(verdict.error)


def test_a_known_name(gradaccum: Command) -> None:
    done = gradaccum("conformance", "train_step")
    assert (done.status, done.text.count("is exact in 4 of 4.")) == (0, 1)


def test_all_of_them_and_the_page(
    gradaccum: Command, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradaccum.cli import conformance

    monkeypatch.setattr(conformance, "installed", lambda: [verdicts.known("textbook"), verdicts.known("train_step")])
    page = tmp_path / "page.html"
    done = gradaccum("conformance", "--html", page)
    assert done.status == 0, "a survey has no status of its own"
    assert "textbook is exact in 1 of 4; TrainStep is exact in 4 of 4" in done.text
    assert "runpy" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    text = page.read_text(encoding="utf-8")
    assert (
        text.count(
            '<pre tabindex="0">from gradaccum import conformance\nfrom gradaccum.conformance.adapters.loops import'
        )
        == 3
    )
    assert "torch " in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing",
            "'nothing' does not name a function.*is train(model, optimizer, loss, batches.*Known names: textbook",
        ),
        ("my_training:test", "my_training has no function 'test'. It has train."),
    ],
)
def test_what_cannot_run(
    gradaccum: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.syspath_prepend(adapter.parent)
    done = gradaccum("conformance", name)
    assert done.status == 2
    for part in message.split(".*"):
        assert part in done.error


# ------------------------------------------------------------------------------------------------------------ pytest
def test_the_option_of_pytest(adapter: Path) -> None:
    known = "".join(f"    {case.name}\n" for case in suite.scenarios() if case.name not in SHORT[:2])
    (adapter.parent / "pytest.ini").write_text(f"[pytest]\nconformance_known =\n{known}", encoding="utf-8")
    names = " or ".join(("equal", "short and window and not schedule", "BatchNorm", "skipped", "clipping"))
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gradaccum", "--conformance", "my_training:train", "-rsx"]
    done = subprocess.run([*command, "-k", names], cwd=adapter.parent, capture_output=True, text=True)
    out = done.stdout
    assert done.returncode == 1, out + done.stderr
    assert "[XPASS(strict)] in conformance_known" in out  # clipping is exact
    assert "short last window: off by 6.3e-02. What it does: each micro-batch's loss is divided" in out
    assert "from my_training import train as train" in out
    assert "the adapter has no parameter scaler" in out
    assert "2 failed, 1 passed, 1 skipped, 16 deselected, 1 xfailed" in out


def test_unused_it_costs_nothing() -> None:
    script = "import sys, pytest_gradaccum; print({'torch', 'gradaccum'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_pytest_refuses(adapter: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gradaccum", "--conformance", "my_training:train"]
    done = subprocess.run(
        [*command, "-o", "conformance_known=sleep"], cwd=adapter.parent, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "conformance_known names 'sleep', and no scenario is called so. There are: 'equal" in done.stderr
