"""What modules keep on themselves during a forward belongs to the micro-batch.

``self.features = x`` in one layer and ``self.features`` in a later one is common. Between the two, other micro-batches
come by and set it too, and nothing would tell: the gradient would be wrong in silence. So attributes that are set while
a micro-batch runs are put back when it goes on, and the last one's stay, as after a loop over the micro-batches.

Seen is what is set through ``nn.Module.__setattr__``. Tensors changed in place, lists appended to, and what code keeps
outside of modules (globals, the lists of forward hooks) is shared by all micro-batches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MISSING: Any = object()


class Attributes:
    """The attributes that one micro-batch has set."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._values: dict[tuple[int, str], Any] = {}

    def note(self, module: nn.Module, name: str) -> None:
        """The running micro-batch sets, or deletes, an attribute."""
        self._modules[id(module)] = module
        self._values[id(module), name] = _MISSING

    def leave(self) -> None:
        """Keeps what the attributes are now."""
        for key, name in self._values:
            self._values[key, name] = self._modules[key].__dict__.get(name, _MISSING)

    def enter(self) -> None:
        """Puts back what they were."""
        for (key, name), value in self._values.items():
            if value is _MISSING:
                self._modules[key].__dict__.pop(name, None)
            else:
                self._modules[key].__dict__[name] = value


class _Watched:
    """Which attributes each thread notes, and how many runs watch."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders = 0
        self.here = threading.local()
        self.setattr: Any = nn.Module.__setattr__
        self.delattr: Any = nn.Module.__delattr__


_watched = _Watched()


@contextmanager
def watched() -> Iterator[None]:
    """While held, modules tell of attributes that are set in threads with `noted_in`."""
    with _watched.lock:
        if _watched.holders == 0:
            _watched.setattr, _watched.delattr = nn.Module.__setattr__, nn.Module.__delattr__
            nn.Module.__setattr__ = _setattr  # pyright: ignore[reportAttributeAccessIssue]
            nn.Module.__delattr__ = _delattr  # pyright: ignore[reportAttributeAccessIssue]
        _watched.holders += 1
    try:
        yield
    finally:
        with _watched.lock:
            _watched.holders -= 1
            if _watched.holders == 0:
                if nn.Module.__setattr__ is _setattr:
                    nn.Module.__setattr__ = _watched.setattr
                if nn.Module.__delattr__ is _delattr:
                    nn.Module.__delattr__ = _watched.delattr


@contextmanager
def noted_in(attributes: Attributes) -> Iterator[None]:
    """While held, attributes that this thread sets are noted."""
    _watched.here.attributes = attributes
    try:
        yield
    finally:
        _watched.here.attributes = None


def _setattr(module: nn.Module, name: str, value: Any) -> None:
    attributes: Attributes | None = getattr(_watched.here, "attributes", None)
    _watched.setattr(module, name, value)
    if attributes is not None and name in module.__dict__:  # neither parameter nor buffer nor module
        attributes.note(module, name)


def _delattr(module: nn.Module, name: str) -> None:
    attributes: Attributes | None = getattr(_watched.here, "attributes", None)
    is_own = name in module.__dict__
    _watched.delattr(module, name)
    if attributes is not None and is_own:
        attributes.note(module, name)
