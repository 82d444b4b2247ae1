"""One result: printed in the terminal and, if asked for, written as an HTML file that needs no other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradaccum as ga
from gradaccum.report import extra_needed
from gradaccum.report.terminal import Cell, Table, Tone, console, print_table, print_text

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A result: its numbers, the answer in a sentence or two, and paragraphs by section.

    ``details`` are sections that the HTML page alone has.
    """

    title: str  # heading of the HTML page; the terminal has the table's own
    table: Table
    lead: Cell
    sections: tuple[tuple[Cell, ...], ...] = ()
    details: tuple[tuple[Cell, ...], ...] = ()


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
        for paragraph in section:
            print_text(terminal, paragraph.text, paragraph.tone)
    if html is not None:
        with extra_needed("cli", "An HTML page"):
            from jinja2 import Environment, StrictUndefined
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        html.write_text(template.render(page=page, made_by=f"gradaccum {ga.__version__}"), encoding="utf-8")
        print_text(terminal, f"Page: {html}", Tone.QUIET)
