"""The command line. `main` is the entry point; everything else is imported only when a command runs."""

from __future__ import annotations

import importlib
import sys
import traceback

from gradaccum.errors import GradAccumError
from gradaccum.report.extras import extra_needed
from gradaccum.report.terminal import print_error

COULD_NOT_RUN = 2  # exit status; 0 is good news and 1 is bad news, which a crash must not be taken for


def main() -> None:
    """Runs the command in ``sys.argv`` and exits with its status."""
    try:
        with extra_needed("cli", "The command line"):
            importlib.import_module("rich")  # typer prints help without it, but no command can do its work
            from gradaccum.cli.app import app
        app()
    except GradAccumError as error:
        print_error(str(error))
        sys.exit(COULD_NOT_RUN)
    except Exception:  # noqa: BLE001  # Python would exit with 1
        traceback.print_exc()
        sys.exit(COULD_NOT_RUN)
