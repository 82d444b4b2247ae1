"""What the site needs besides the pages as they are read in the repository.

Links that lead out of this folder (examples, benchmarks, the README) lead nowhere on the site: they become the path, to
be looked up in the repository. Comments that steer how the tests run a page are left out.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
STEERING = re.compile(r"^<!-- ?(?:run first\n.*?^-->|not run:.*?-->)[ ]*\n", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page before it is made into HTML."""
    folder = PurePosixPath(page.file.src_uri).parent
    return LINK.sub(lambda link: inside(link, folder), STEERING.sub("", markdown))


def inside(link: re.Match[str], folder: PurePosixPath) -> str:
    """The link as it is where it leads to another page; else its text and the path in the repository."""
    text, target = link[1], link[2]
    if re.match(r"[a-z]+:", target):
        return link[0]
    path = (DOCS / folder / target).resolve()
    if path.is_relative_to(DOCS) and path.is_file():
        return link[0]
    name = path.relative_to(DOCS.parent).as_posix() if path.is_relative_to(DOCS.parent) else target
    return text if name.endswith(text.strip("`")) and "/" in text else f"{text} (`{name}`)"
