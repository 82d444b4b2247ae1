"""The command line. `main` is the entry point; everything else is imported only when a command runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from types import TracebackType

from gradaccum.errors import GradAccumError
from gradaccum.report import extra_needed

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
COULD_NOT_RUN = 2  # exit status; 0 is good news and 1 is bad news, which a crash must not be taken for


def main() -> None:
    """Runs the command in ``sys.argv`` and exits with its status."""
    try:
        with extra_needed("cli", "The command line"):
            importlib.import_module("rich")  # typer prints help without it, but no command can do its work
            from gradaccum.cli.app import app
        app()
    except GradAccumError as error:
        sys.stderr.write(f"gradaccum: {error}\n")  # not by rich, which may be what is missing
        sys.exit(COULD_NOT_RUN)
    except Exception as error:  # noqa: BLE001  # Python would exit with 1
        traceback.print_exception(error.with_traceback(_users_frames(error)))
        sys.exit(COULD_NOT_RUN)


def _users_frames(error: BaseException) -> TracebackType | None:
    """The frames from the user's first on: those of the command line in front of it say nothing about their error.

    All of them where none is the user's, and none for an error in the syntax, which names its line itself.
    """
    typer = importlib.util.find_spec("typer")
    of_commands = (_OURS, *([] if typer is None or typer.origin is None else [os.path.dirname(typer.origin) + os.sep]))
    frames = error.__traceback__
    while frames is not None:
        name = frames.tb_frame.f_code.co_filename
        if not name.startswith("<frozen ") and not os.path.abspath(name).startswith(of_commands):
            return frames
        frames = frames.tb_next
    return None if isinstance(error, SyntaxError) else error.__traceback__
