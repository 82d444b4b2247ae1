"""Ratios in a picture. Formats, and what is said without matplotlib, are tested with all pictures in tests/report."""

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def group(script: ModuleType, *ratios: float) -> Any:
    loops = tuple(script.Bar(label=f"loop {i}", ratio=ratio) for i, ratio in enumerate(ratios))
    return script.Group(title="a job", bars=loops)


def words(path: Path) -> list[str]:
    """What an SVG says: text is drawn as paths, and matplotlib leaves the words in a comment above each."""
    return [line.strip()[5:-4] for line in path.read_text(encoding="utf-8").splitlines() if "<!-- " in line]


def test_every_bar_has_its_name_and_its_number_in_order(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    other = script.Group(title="another", bars=(script.Bar(label="peer", ratio=1.5, role=script.Role.PEER),))
    script.draw_ratios([group(script, 0.54, 2.06), other], path, title="T", base="textbook loop")
    said = words(path)
    assert [word for word in said if word in ("loop 0", "loop 1", "peer")] == ["loop 0", "loop 1", "peer"]
    assert [word for word in said if word in ("0.54", "2.06", "1.50")] == ["0.54", "2.06", "1.50"]
    assert {"T", "a job", "another"} <= set(said)
    assert any("textbook loop's (1.00)" in word for word in said)


@pytest.mark.parametrize("ratio", [0.01, 1.0, 50.0])
def test_any_ratio(script: ModuleType, ratio: float, tmp_path: Path) -> None:
    script.draw_ratios([group(script, ratio)], tmp_path / "a.svg", title="T", base="loop")
    assert f"{ratio:.2f}" in words(tmp_path / "a.svg")


def test_it_grows_with_its_bars(script: ModuleType, tmp_path: Path) -> None:
    heights: list[int] = []
    for count in (1, 10):
        path = tmp_path / f"{count}.png"
        script.draw_ratios([group(script, *[1.1] * count)], path, title="T", base="loop")
        heights.append(struct.unpack(">II", path.read_bytes()[16:24])[1])
    assert heights[1] > 2 * heights[0]
