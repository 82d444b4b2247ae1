"""Reads a tensor that a node has saved for its backward, without taking it away from the node.

Three kinds are told apart before the backward runs, since afterwards it would be too late to step aside:

- saved as it is: read as often as one likes;
- saved by ``torch.utils.checkpoint(use_reentrant=False)``: computed again when it is read, and given out once. The
  holder's record of that is replaced by one that does not count the first time (`torch.utils.checkpoint`, classes
  ``_Holder`` and ``_checkpoint_hook``, torch 2.11 to 2.13);
- saved by other hooks (offloading, compression): what reading twice does is not known, so these are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

_HOLDER: Any = getattr(checkpoint, "_Holder", None)


def can_read_twice(node: Any, name: str) -> bool:
    """Whether ``name`` of a node can be read in a hook before the node reads it itself; prepares it for that.

    Args:
        node: of a graph whose backward has not run.
        name: of the saved tensor, such as ``mat1``. It is read as ``_saved_mat1``.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}")
    try:
        hook, data = raw.unpack_hook, raw.data
    except (AttributeError, RuntimeError):  # an older torch; or a graph that is gone, which torch itself will tell
        return False
    if hook is None:
        return isinstance(data, Tensor) and type(data) in (Tensor, torch.nn.Parameter) and data.layout is torch.strided
    handles: Any = getattr(data, "handles", None)
    if _HOLDER is None or type(data) is not _HOLDER or type(handles) not in (dict, _ReadTwice):
        return False
    if not handles:
        data.handles = _ReadTwice()
    return type(data.handles) is _ReadTwice


class _ReadTwice(dict[Any, Any]):
    """Where a holder keeps, for each backward, the handle of what was computed again; None once it is given out."""

    def __init__(self) -> None:
        super().__init__()
        self._was_read = False

    def __setitem__(self, key: Any, handle: Any) -> None:
        if handle is None and not self._was_read:
            self._was_read = True
            return
        super().__setitem__(key, handle)
