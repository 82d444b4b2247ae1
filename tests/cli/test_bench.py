"""``gradaccum bench``: what it prints and what it writes. How fast anything is, is not tested."""

import json
import sys
from pathlib import Path

import pytest

from gradaccum.cli import bench, main


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = (bench.Job(name="tiny", width=2, layers=1, rows=3, updates=1, rounds=2),)
    monkeypatch.setattr(bench.run_bench, "__kwdefaults__", {"jobs": jobs})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gradaccum", "bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code or 0  # type: ignore[return-value]


def test_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("tiny")]
    assert len(row) == 4


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--json", str(path)) == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert set(figures) == {"machine", "versions", "jobs"}
    assert set(figures["jobs"]["tiny"]) == {"textbook_seconds", "gradaccum_seconds", "ratio"}


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.png"
    assert run(monkeypatch, "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "Picture:" in capsys.readouterr().out


def test_a_picture_of_no_known_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--plot", str(tmp_path / "bench.txt")) == 2
    out, err = capsys.readouterr()
    assert out == "", "refused before the work"
    assert "a picture ends in .png, .svg, .pdf" in " ".join(err.split())


@pytest.mark.parametrize(("option", "name"), [("--json", "figures.json"), ("--plot", "bench.png")])
def test_a_folder_that_is_not_there(
    option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, option, str(tmp_path / "nowhere" / name)) == 2
    assert "there is no folder" in " ".join(capsys.readouterr().err.split())
