"""The whole command as a user runs it, once; and what it does with bad news and bad options, on a small task."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradaccum.cli import main
from gradaccum.cli.demo import command, ways
from gradaccum.cli.demo.regression import regression_task


def test_the_whole_demo_in_a_pipe_that_only_knows_ascii(tmp_path: Path) -> None:
    # One test, since the demo is to run once: it takes longer than all other tests of the command line together.
    picture = tmp_path / "demo.png"
    code = "from gradaccum.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "demo", "--plot", str(picture)],
        env={**os.environ, "TERM": "dumb", "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

    lines = done.stdout.splitlines()
    assert any("EXACT: every update is the whole batch's." in line for line in lines)
    headings = [line.rstrip("-").rstrip() for line in lines if line.endswith("---") and not line.startswith(" ")]
    assert headings == ["1,000 samples", "957 samples", "Tiny Shakespeare"]
    assert [line.split() for line in lines if "verdict" in line] == [
        ["verdict", "-", "same", "exact"],
        ["verdict", "-", "drifts", "exact"],
        ["verdict", "-", "drifts", "exact"],
    ]

    losses = [line.split()[3:] for line in lines if "loss, epoch" in line]
    assert len(losses) == 9
    assert all(len(loss.partition(".")[2]) == 10 for row in losses for loss in row)
    for whole, textbook, library in losses[:3]:  # equal to rounding where everything divides
        assert float(textbook) == pytest.approx(float(whole), rel=1e-6)
        assert float(library) == pytest.approx(float(whole), rel=1e-6)

    assert max(len(line) for line in lines if not line.startswith("  Picture: ")) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 20_000


# ------------------------------------------------------------------------------------------------------ on a small task
@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_tasks", lambda: [regression_task(97, title="97 samples", text="Few.")])


def status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradaccum", "demo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


@pytest.mark.usefixtures("_small")
def test_good_news_exits_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(monkeypatch) == 0
    assert "97 samples" in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_an_inexact_library_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ways, "library", ways.textbook_loop)
    assert status(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "NOT EXACT. 97 samples: off by " in out
    assert "EXACT: every update" not in out


@pytest.mark.usefixtures("_small")
def test_the_number_of_threads_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(2)
    assert status(monkeypatch) == 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("demo.docx", "a picture ends in .png, .svg, .pdf", id="format"),
        pytest.param("demo", "a picture ends in .png, .svg, .pdf", id="no format"),
        pytest.param("no/such/folder/demo.png", "there is no folder no/such/folder", id="folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_tasks", lambda: pytest.fail("the work began"))
    monkeypatch.setenv("COLUMNS", "200")
    assert status(monkeypatch, "--plot", name) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_plot_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_tasks", lambda: pytest.fail("the work began"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert status(monkeypatch, "--plot", str(tmp_path / "demo.png")) == 2
    assert "The option --plot needs 'matplotlib'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
