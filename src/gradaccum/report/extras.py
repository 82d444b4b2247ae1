"""Optional dependencies: asked for only where they are needed, and by name where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradaccum.errors import MissingExtraError


@contextmanager
def extra_needed(extra: str, purpose: str) -> Iterator[None]:
    """Turns a failed import into an error that says what to install.

    Args:
        extra: name of the extra, as in ``pip install 'gradaccum[extra]'``.
        purpose: what cannot be done without it, as the subject of a sentence.

    Raises:
        MissingExtraError: a module other than our own was not found.

    Example:
        >>> with extra_needed("plot", "A picture"):
        ...     import nobody_has_this
        Traceback (most recent call last):
        gradaccum.errors.MissingExtraError: A picture needs 'nobody_has_this', ... pip install 'gradaccum[plot]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "gradaccum":
            raise  # our own mistake, which no installing would mend
        raise MissingExtraError(
            f"{purpose} needs {error.name!r}, which is not installed. Type: pip install 'gradaccum[{extra}]'"
        ) from error
