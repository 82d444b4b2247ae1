"""How the reference reads docstrings: a section ``Example:`` is one of examples, whose ``>>>`` lines are code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Griffe knows the plural of Google style only."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^([ ]*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
