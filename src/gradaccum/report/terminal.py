"""The terminal: results to stdout, everything that comes and goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where results are printed: coloured in a terminal, plain in a pipe, no colour of its own for numbers."""
    from rich.console import Console

    return Console(highlight=False)


def print_error(message: str) -> None:
    """Prints to stderr, and needs nothing installed: it has to be able to say what is missing."""
    sys.stderr.write(f"gradaccum: {message}\n")


@contextmanager
def progress(what: str, *, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr that is gone when it is done; nothing where stderr is no terminal, or one that cannot erase.

    Yields:
        To be called once for each of ``total`` units.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    can_erase = stderr.is_terminal and not stderr.is_dumb_terminal
    with Progress(*columns, console=stderr, transient=True, disable=not can_erase) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda: bars.advance(bar)
