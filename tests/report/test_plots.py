import struct
import sys
from pathlib import Path

import pytest

import gradaccum as ga
from gradaccum.report.plots import SUFFIXES, Mark, Panel, Series, draw

PNG = b"\x89PNG\r\n\x1a\n"


def panel(**changes: object) -> Panel:
    series = (
        Series(label="whole batch", mark=Mark.REFERENCE, values=(1.0, 0.5, 0.25)),
        Series(label="gradaccum", mark=Mark.GOOD, values=(1.0, 0.5, 0.0)),
    )
    return Panel(**{"series": series, "title": "T", "x_label": "update", "y_label": "loss", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("suffix", "start"), [(".png", PNG), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_every_format_that_is_promised(suffix: str, start: bytes, tmp_path: Path) -> None:
    assert suffix in SUFFIXES
    draw([[panel(), panel()], [panel(), panel()]], tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data.startswith(start)
    if suffix == ".png":
        width, height = struct.unpack(">II", data[16:24])
        assert width > height > 500
    pyplot = sys.modules.get("matplotlib.pyplot")  # it would want a display, and keep a state
    assert pyplot is None or not pyplot.get_fignums()


def test_what_is_less_than_a_logarithmic_axis_shows_lies_on_its_edge(tmp_path: Path) -> None:
    pictures = []
    for value in (0.0, 1e-300, 1e-17):
        series = (Series(label="a", mark=Mark.BEST, values=(value, 1e-6, 1e6)),)
        draw([[panel(series=series, is_logarithmic=True)]], tmp_path / "a.png")
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_curves_of_one_name_share_a_legend_entry(tmp_path: Path) -> None:
    draw([[panel(), panel()]], tmp_path / "a.svg")
    # Text is drawn as paths; matplotlib leaves the words in a comment above each.
    assert (tmp_path / "a.svg").read_text().count("<!-- gradaccum -->") == 1


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ga.MissingExtraError, match=r"A picture needs 'matplotlib'.*pip install matplotlib; .* extra 'plot'"
    ):
        draw([[panel()]], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
