"""The command line. `main` is the entry point; everything else is imported only when a command runs."""

from __future__ import annotations

import importlib
import sys
import traceback

from gradaccum.errors import GradAccumError
from gradaccum.report import extra_needed

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
    except Exception:  # noqa: BLE001  # Python would exit with 1
        traceback.print_exc()
        sys.exit(COULD_NOT_RUN)
