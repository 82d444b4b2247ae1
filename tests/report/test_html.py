import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import gradaccum as ga
from gradaccum.report.html import Bar, Bars, Page, write_page
from gradaccum.report.tables import Cell, Row, Table, Tone

PAGE = Page(
    title="What <fits> & what not",
    lead=Cell(text="Take 4.", tone=Tone.GOOD),
    table=Table(
        title="not shown",
        text="A table.",
        columns=("peak", "fits"),
        rows=(Row(label="1", cells=(Cell(text="9 GiB"), Cell(text="no", tone=Tone.BAD))),),
    ),
    bars=(
        Bars(
            title="Memory", bars=(Bar(label="1", text="9 GiB", fraction=0.375, tone=Tone.BAD),), limit=0.5,
            limit_label="24 GiB",
        ),
        Bars(title="Speed", bars=(Bar(label="1", text="10", fraction=1.0),)),
    ),
    paragraphs=("First.", "Second <b>."),
    made_by="gradaccum",
)  # fmt: skip
VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Balanced(HTMLParser):
    """Every element is closed, in order, and nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(tmp_path: Path) -> str:
    path = tmp_path / "page.html"
    write_page(PAGE, path)
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    text = written(tmp_path)
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert text.startswith("<!DOCTYPE html>")
    assert "<script" not in text
    assert "http" not in text
    words = " ".join(parser.text)
    for expected in (
        "What <fits> & what not",
        "Take 4.",
        "A table.",
        "9 GiB",
        "First.",
        "Second <b>.",
        "24 GiB",
        "gradaccum",
    ):
        assert expected in words


def test_text_is_not_markup(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "What &lt;fits&gt; &amp; what not" in text
    assert "Second &lt;b&gt;." in text


def test_bars_and_tones(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert re.search(r'class="bar bad" style="width: 37\.50%"', text)
    assert text.count('class="limit"') == 1
    assert "left: 50.00%" in text
    assert '<p class="lead good">' in text
    assert '<td class="bad">no</td>' in text


def test_without_jinja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ga.MissingExtraError, match=r"An HTML page needs 'jinja2'.*pip install 'gradaccum\[cli\]'"):
        write_page(PAGE, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
