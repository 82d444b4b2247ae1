"""Tables in a terminal, pages and pictures in files. Besides `gradaccum.cli`, only this folder prints or draws.

It knows how to show a table or a curve, and nothing about what is in it: whoever has results turns them into a `Table`
or a `Panel` of plain words and numbers.

| file | idea |
| --- | --- |
| `terminal.py` | tables and paragraphs in at most 80 columns |
| `plots.py` | curves and points in a picture |
| `code_words.py` | which parts of a sentence are Python |
| `machine.py` | versions and machine, for footers and figures |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradaccum.errors import MissingExtraError

_DISTRIBUTIONS = {"ignite": "pytorch-ignite"}  # where a package to install has another name than the module


@contextmanager
def extra_needed(extra: str, purpose: str) -> Iterator[None]:
    """Context manager that turns a failed import into a `MissingExtraError` that says which extra to install.

    ``purpose`` is what cannot be done without it, as the subject of a sentence.

    Example:
        >>> with extra_needed("plot", "A picture"):
        ...     import nobody_has_this
        Traceback (most recent call last):
        gradaccum.errors.MissingExtraError: A picture needs 'nobody_has_this', ... the extra 'plot' of this package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # transformers, of something that it needs itself
            raise MissingExtraError(f"{purpose} cannot be had: {error}") from error
        if error.name.partition(".")[0] == "gradaccum":
            raise  # a mistake in this package, which installing an extra would not mend
        name = _DISTRIBUTIONS.get(error.name, error.name)
        raise MissingExtraError(
            f"{purpose} needs {name!r}, which is not installed. Type: pip install {name}; it is in the extra {extra!r} "
            "of this package."
        ) from error
