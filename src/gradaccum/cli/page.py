"""One result: printed in the terminal and, if asked for, written as an HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradaccum.report import extra_needed
from gradaccum.report.machine import footer
from gradaccum.report.terminal import Cell, Table, Tone, console, print_table, print_text

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Paragraphs, under a heading or without one."""

    heading: Cell | None = None
    paragraphs: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A result: its numbers, the answer in a sentence or two, and paragraphs by section.

    ``details`` are sections that the HTML page alone has.
    """

    title: Cell  # heading of the HTML page; the terminal has the table's own
    table: Table
    lead: Cell
    sections: tuple[Section, ...] = ()
    details: tuple[Section, ...] = ()


def show_page(page: Page, html: Path | None) -> None:
    """Prints a page and, unless ``html`` is None, writes it into that file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    terminal = console()
    print_table(terminal, page.table)
    print_text(terminal, page.lead.text, page.lead.tone)
    for section in page.sections:
        terminal.print()
        for paragraph in (*([] if section.heading is None else [section.heading]), *section.paragraphs):
            print_text(terminal, f"{paragraph.head} {paragraph.text}".lstrip(" "), paragraph.tone)
    if html is not None:
        html.write_text(as_html(page), encoding="utf-8")
        print_text(terminal, f"Page: {html}", Tone.QUIET)


def as_html(page: Page) -> str:
    """Returns the page as HTML.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    with extra_needed("cli", "An HTML page"):
        from jinja2 import Environment, StrictUndefined
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, pieces=_pieces, footer=footer())


def _pieces(cell: Cell) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each is code."""
    rest = cell.text
    for code in cell.code:
        before, found, rest = rest.partition(code)
        yield before, False
        yield found, True
    yield rest, False
