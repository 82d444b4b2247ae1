"""The picture of what is on file."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import FOLDER


def test_ratios_are_to_the_textbook_loop(script: ModuleType, tmp_path: Path) -> None:
    loops = {
        "sentence-transformers": {"ratio": 1.0},
        "gradaccum, what fits": {"ratio": 0.6},
        "textbook loop": {"ratio": 0.5},
    }
    (tmp_path / "contrastive.json").write_text(json.dumps({"loops": loops}), encoding="utf-8")
    (group,) = script.groups_in(tmp_path)
    assert [(bar.label, bar.ratio) for bar in group.bars] == [
        ("gradaccum, graphs kept", 1.2),
        ("sentence-transformers", 2.0),
    ]


def test_each_file_that_is_drawn_is_there_with_our_bars(script: ModuleType) -> None:
    for name, groups_of in script.FILES.items():
        groups = groups_of(json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8")))
        assert all(any(bar.role is script.Role.OURS for bar in group.bars) for group in groups), name


def test_the_picture(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.svg"
    monkeypatch.setattr(sys, "argv", ["plot.py", "--to", str(picture)])
    script.main()
    drawn = picture.read_text(encoding="utf-8")
    assert "<!-- GPT-2 small, 32 tokens a micro-batch -->" in drawn
    assert "<!-- Lightning Fabric -->" in drawn
    assert str(picture) in capsys.readouterr().out


def test_the_documents_picture_is_there(script: ModuleType) -> None:
    assert script.PICTURE.read_bytes().startswith(b"\x89PNG")
