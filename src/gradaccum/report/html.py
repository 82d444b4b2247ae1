"""A report as one HTML file that needs nothing else: no scripts, no fonts, no pictures to go with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradaccum.report.extras import extra_needed
from gradaccum.report.tables import Cell, Table, Tone

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: stands before it.
        text: its value in words, stands after it.
        fraction: its length, of the whole width.
        tone: its colour.
    """

    label: str
    text: str
    fraction: float
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars below each other, with a line through all of them at ``limit``, as a fraction of the width."""

    title: str
    bars: tuple[Bar, ...]
    limit: float | None = None
    limit_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What is shown.

    Attributes:
        title: the heading.
        lead: the answer, in a sentence or two.
        table: its own title is not shown.
        bars: charts.
        paragraphs: what there is to say besides.
        made_by: the last line.
    """

    title: str
    lead: Cell
    table: Table
    bars: tuple[Bars, ...] = ()
    paragraphs: tuple[str, ...] = ()
    made_by: str = ""


def template(purpose: str = "An HTML page") -> Template:
    """What pages are made of; asked for ahead, it tells before the work whether a page could be made after it.

    Args:
        purpose: what cannot be done without it, as the subject of a sentence.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    with extra_needed("cli", purpose):
        from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def write_page(page: Page, path: Path) -> None:
    """Writes the page into a file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    path.write_text(template().render(page=page), encoding="utf-8")
