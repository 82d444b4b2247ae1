"""What a node's hook does: it adds the gradient of one use of a weight to the weight's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""What flows into a node with one result; None where nothing does."""

Add = Callable[[Gradients], None]
"""A hook of a node."""
