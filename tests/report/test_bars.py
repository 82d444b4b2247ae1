import struct
import sys
from pathlib import Path

import pytest

import gradaccum as ga
from gradaccum.report.bars import Bar, Group, Role, draw_ratios
from gradaccum.report.plots import supported_suffixes

STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF"}


def group(*ratios: float, title: str = "a job") -> Group:
    return Group(title=title, bars=tuple(Bar(label=f"loop {i}", ratio=ratio) for i, ratio in enumerate(ratios)))


def words(path: Path) -> list[str]:
    """What an SVG says: text is drawn as paths, and matplotlib leaves the words in a comment above each."""
    return [line.strip()[5:-4] for line in path.read_text(encoding="utf-8").splitlines() if "<!-- " in line]


@pytest.mark.parametrize("suffix", sorted(STARTS))
def test_every_format_that_is_promised(suffix: str, tmp_path: Path) -> None:
    assert suffix in supported_suffixes()
    path = tmp_path / f"a{suffix}"
    draw_ratios([group(0.5, 1.0, 2.0)], path, title="T", base="loop")
    assert path.read_bytes().startswith(STARTS[suffix])


def test_every_bar_has_its_name_and_its_number_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    other = Group(title="another", bars=(Bar(label="peer", ratio=1.5, role=Role.PEER),))
    draw_ratios([group(0.54, 2.06), other], path, title="T", base="textbook loop")
    said = words(path)
    assert [word for word in said if word in ("loop 0", "loop 1", "peer")] == ["loop 0", "loop 1", "peer"]
    assert [word for word in said if word in ("0.54", "2.06", "1.50")] == ["0.54", "2.06", "1.50"]
    assert {"T", "a job", "another"} <= set(said)
    assert any("textbook loop's (1.00)" in word for word in said)


@pytest.mark.parametrize("ratio", [0.01, 1.0, 50.0])
def test_any_ratio(ratio: float, tmp_path: Path) -> None:
    draw_ratios([group(ratio)], tmp_path / "a.svg", title="T", base="loop")
    assert f"{ratio:.2f}" in words(tmp_path / "a.svg")


def test_it_grows_with_its_bars(tmp_path: Path) -> None:
    heights = []
    for count in (1, 10):
        path = tmp_path / f"{count}.png"
        draw_ratios([group(*[1.1] * count)], path, title="T", base="loop")
        heights.append(struct.unpack(">II", path.read_bytes()[16:24])[1])
    assert heights[1] > 2 * heights[0]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ga.MissingExtraError, match=r"A picture needs 'matplotlib'.*pip install 'gradaccum\[plot\]'"):
        draw_ratios([group(1.0)], tmp_path / "a.png", title="T", base="loop")
    assert not list(tmp_path.iterdir())
