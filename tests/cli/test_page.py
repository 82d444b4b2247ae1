import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import gradaccum as ga
from gradaccum.cli.page import Page, Section, show_page
from gradaccum.report.terminal import Cell, Row, Table, Tone

PAGE = Page(
    title=Cell(text="What <fits> & what not", code=("<fits>",)),
    lead=Cell(text="Take 4.", tone=Tone.GOOD),
    table=Table(
        title="not shown",
        text="A table.",
        head="size",
        columns=("peak", "fits"),
        rows=(
            Row(label="1", cells=(Cell(text="9 GiB", fraction=0.375, tone=Tone.BAD), Cell(text="no", tone=Tone.BAD))),
        ),
    ),
    sections=(
        Section(
            heading=Cell(text="First.", tone=Tone.BAD),
            paragraphs=(Cell(text="call f(x) and <b>.", head="Type:", code=("f(x)", "<b>")),),
        ),
        Section(paragraphs=(Cell(text="Second <b>."), Cell(text="Third.", fraction=1.0))),
    ),
)
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
    show_page(PAGE, path)
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
    for expected in ["What <fits> & what not", "Take 4.", "A table.", "9 GiB", "First.", "Second <b>.", "Third."]:
        assert expected in words
    assert "<title>What &lt;fits&gt; &amp; what not</title>" in text
    assert "Second &lt;b&gt;." in text


def test_bars_and_tones(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert re.search(r'<td class="bad figure">9 GiB<span class="bar bad" style="width: 37\.50%"', text)
    assert re.search(r'<p class="plain">Third\.<span class="bar plain" style="width: 100\.00%"', text)
    assert text.count('class="bar ') == 2, "no bar without a fraction"
    assert '<p class="lead good">' in text
    assert '<td class="bad figure">no</td>' in text


def test_every_column_has_a_heading_and_code_is_set_as_code(tmp_path: Path) -> None:
    text = written(tmp_path)
    heads = [f'<th scope="col">{head}</th>' for head in ("size", "peak", "fits")]
    assert f"<thead><tr>{''.join(heads)}</tr></thead>" in text
    assert "<h1>What <code>&lt;fits&gt;</code> &amp; what not</h1>" in text
    assert '<h2 class="bad">First.</h2>' in text
    assert "<b>Type:</b> <span>call <code>f(x)</code> and <code>&lt;b&gt;</code>.</span>" in text


def test_the_footer_has_versions_machine_and_date(tmp_path: Path) -> None:
    text = written(tmp_path).partition("<footer>")[2]
    for expected in (f"gradaccum {ga.__version__}", f"torch {torch.__version__}", "python 3.", "cores", " UTC."):
        assert expected in text


def test_the_terminal_has_the_same_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    show_page(PAGE, None)
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.strip() for line in out.splitlines()]
    assert lines[lines.index("Take 4.") :] == [
        "Take 4.", "", "First.", "Type: call f(x) and <b>.", "", "Second <b>.", "Third.",
    ]  # fmt: skip
    assert "What <fits>" not in out, "the table has a title of its own"


def test_code_keeps_its_lines_and_details_are_the_pages_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = Cell(text="if x < 1:\n    print(x)", tone=Tone.CODE)
    detail = Section(paragraphs=(Cell(text="A detail."),))
    path = tmp_path / "page.html"
    show_page(dataclasses.replace(PAGE, sections=(Section(paragraphs=(code,)),), details=(detail,)), path)
    out = capsys.readouterr().out
    assert "  if x < 1:\n      print(x)\n" in out
    assert "A detail." not in out
    text = path.read_text(encoding="utf-8")
    assert '<pre tabindex="0">if x &lt; 1:\n    print(x)</pre>' in text
    assert "A detail." in text


def test_without_jinja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ga.MissingExtraError, match=r"An HTML page needs 'jinja2'.*pip install jinja2"):
        show_page(PAGE, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
