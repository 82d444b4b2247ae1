"""The picture of what is on file."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from scripts import FOLDER, benchmark


@pytest.fixture(scope="module")
def plot() -> Iterator[ModuleType]:
    with benchmark("plot") as module:
        yield module


def test_ratios_are_to_the_textbook_loop(plot: ModuleType, tmp_path: Path) -> None:
    loops = {
        "sentence-transformers": {"ratio": 1.0},
        "gradaccum, what fits": {"ratio": 0.6},
        "textbook loop": {"ratio": 0.5},
    }
    (tmp_path / "contrastive.json").write_text(json.dumps({"loops": loops}), encoding="utf-8")
    (group,) = plot.groups_in(tmp_path)
    assert [(bar.label, bar.ratio) for bar in group.bars] == [
        ("gradaccum, graphs kept", 1.2),
        ("sentence-transformers", 2.0),
    ]


def test_each_file_that_is_drawn_is_there_with_our_bars(plot: ModuleType) -> None:
    for name, groups_of in plot.FILES.items():
        groups = groups_of(json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8")))
        assert all(any(bar.role is plot.Role.OURS for bar in group.bars) for group in groups), name


def test_the_picture(
    plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.svg"
    monkeypatch.setattr(sys, "argv", ["plot.py", "--to", str(picture)])
    plot.main()
    drawn = picture.read_text(encoding="utf-8")
    assert "<!-- GPT-2 small, 32 tokens a micro-batch -->" in drawn
    assert "<!-- Lightning Fabric -->" in drawn
    assert str(picture) in capsys.readouterr().out


def test_the_documents_picture_is_there(plot: ModuleType) -> None:
    assert plot.PICTURE.read_bytes().startswith(b"\x89PNG")
