import io
import re

import pytest
from rich.console import Console

from gradaccum.report.terminal import Cell, Row, Table, Tone, console, print_table, print_text

TABLE = Table(
    title="A title",
    text="What is compared, in so many words that they do not fit into a single line of eighty columns or fewer.",
    head="figure",
    columns=("whole batch", "gradaccum"),
    rows=(
        Row(label="loss", cells=(Cell(text="1.0000000000"), Cell(text="1.0000000001")), ends_section=True),
        Row(label="verdict", cells=(Cell(text="-", tone=Tone.QUIET), Cell(text="exact", tone=Tone.GOOD))),
    ),
)


def printed(table: Table, *, encoding: str = "utf-8", width: int | None = None, terminal: bool = False) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    color = "truecolor" if terminal else None
    out = Console(file=file, width=width, force_terminal=terminal, color_system=color, highlight=False, _environ={})
    print_table(out, table)
    file.seek(0)
    return file.read()


def test_results_go_to_stdout_and_numbers_get_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("loss 1.5")
    assert capsys.readouterr() == ("loss 1.5\n", "")


def test_everything_is_said_under_its_head_in_80_columns_without_colours() -> None:
    text = printed(TABLE)
    lines, words = text.splitlines(), text.split()
    for word in ("title", "compared,", "figure", "gradaccum", "1.0000000001", "verdict", "exact"):
        assert word in words
    assert max(map(len, lines)) <= 80
    head, cells = (next(line.rstrip() for line in lines if word in line) for word in ("whole batch", "1.0000000001"))
    assert len(head) == len(cells)
    assert "\x1b" not in text


def test_a_terminal_gets_colours() -> None:
    assert re.search(r"\x1b\[1;32m *exact", printed(TABLE, terminal=True))


def test_an_output_that_only_knows_ascii_gets_ascii() -> None:
    text = printed(TABLE, encoding="ascii")
    assert text.isascii()
    assert text.split() == printed(TABLE).replace("─", "-").split()  # the same, with rules of other characters


@pytest.mark.parametrize("width", [40, 60, 200])
def test_other_widths(width: int) -> None:
    text = printed(TABLE, width=width)
    assert max(map(len, text.splitlines())) <= min(width, 80)
    assert "1.0000000001" in text


def test_brackets_are_text_not_markup() -> None:
    file = io.StringIO()
    print_text(Console(file=file, width=80), "pip install 'gradaccum[plot]' and [bold]nothing[/bold]")
    assert "gradaccum[plot]" in file.getvalue()
    assert "[bold]nothing[/bold]" in file.getvalue()


def test_a_table_that_is_too_wide_comes_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    heads = tuple(f"column {number:02}" for number in range(12))
    row = Row(label="a long label of a row", cells=tuple(Cell(text=f"cell{number:02}") for number in range(12)))
    print_table(console(), Table(title="Wide", text="", head="what", columns=heads, rows=(row,)))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("a long label of a row") > 1
    assert out.count("what") > 1, "the labels have their head in every part"
    for number in range(12):
        assert out.count(f"column {number:02}") == out.count(f"cell{number:02}") == 1
