"""Results in the terminal, in at most 80 columns, without colour as good as with it.

Rich draws the rules in ASCII where the output cannot encode anything better, so our own words stay ASCII too.
"""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 80  # columns: what a pipe, a dumb terminal and the smallest window have
_INDENT = 2


class Tone(enum.Enum):
    """How a cell or a paragraph is meant; the value is rich's style for it."""

    PLAIN = ""
    QUIET = "dim"
    GOOD = "bold green"
    BAD = "bold red"
    CODE = "cyan"  # a paragraph whose lines are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Text with a tone: an entry of a table, or a paragraph.

    Attributes:
        head: a word in front of a paragraph that says what it is about.
        code: what in the text is code, in the order of the text; a page sets it as code.
        fraction: from 0 to 1, drawn on a page as a bar of that length.
    """

    text: str
    tone: Tone = Tone.PLAIN
    head: str = ""
    code: tuple[str, ...] = ()
    fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table; ``ends_section`` draws a rule below it."""

    label: str
    cells: tuple[Cell, ...]
    ends_section: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What is shown under one heading. Each row has as many cells as there are columns."""

    title: str
    text: str  # what is being compared, in a sentence or two
    head: str  # of the labels' column; "" where the labels say themselves what they are
    columns: tuple[str, ...]  # heads of the cells' columns
    rows: tuple[Row, ...]


def console() -> Console:
    """Returns rich's console on stdout: coloured in a terminal, plain in a pipe, no colour of its own for numbers."""
    from rich.console import Console

    return Console(highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Prints the heading, the text and the table; one that is too wide in parts, a few columns each."""
    from rich import box
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table as RichTable
    from rich.text import Text

    # Rich's own substitute would put bars between the columns. A box is 8 lines: the third is the rule below the heads.
    rules = box.Box("\n".join(["    ", "    ", " -- ", *["    "] * 5]), ascii=True)
    shape = rules if console.options.ascii_only else box.SIMPLE_HEAD
    width = min(_WIDTH, console.width)
    console.print(Rule(Text(table.title, style="bold"), align="left", style=Tone.QUIET.value), width=width)
    print_text(console, table.text, Tone.QUIET)
    console.print()
    for part in _parts(table, width - _INDENT):
        body = RichTable(box=shape, header_style="bold", show_edge=False, pad_edge=False)
        body.add_column(table.head)
        for column in table.columns[part]:
            body.add_column(column, justify="right", no_wrap=True)
        for row in table.rows:
            cells = [Text(cell.text, style=cell.tone.value) for cell in row.cells[part]]
            body.add_row(Text(row.label), *cells, end_section=row.ends_section)
        console.print(Padding(body, (0, 0, 0, _INDENT), expand=False), width=width)
        console.print()


def _parts(table: Table, width: int) -> list[slice]:
    """Columns that fit beside the labels, which may be broken into lines of half of the width."""
    left = width - min(max(len(table.head), *(len(row.label) for row in table.rows), 0), width // 2)
    parts, start, used = list[slice](), 0, 0
    for index, head in enumerate(table.columns):
        needed = 3 + max(len(head), *(len(row.cells[index].text) for row in table.rows), 0)
        if index > start and used + needed > left:
            parts.append(slice(start, index))
            start, used = index, 0
        used += needed
    return [*parts, slice(start, len(table.columns))]


def print_text(console: Console, text: str, tone: Tone = Tone.PLAIN) -> None:
    """Prints a paragraph, broken into lines of at most 80 columns and set in a little."""
    from rich.text import Text

    width = min(_WIDTH, console.width) - _INDENT
    for line in text.splitlines() if tone is Tone.CODE else textwrap.wrap(text, width):
        console.print(Text(" " * _INDENT + line, style=tone.value), soft_wrap=True)
