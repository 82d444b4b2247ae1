"""Has a check run before each call of a method of one object, for a time.

An attribute of the object would be simpler, but the ``state_dict()`` of torch's schedulers is their ``__dict__``, and
would have it too. So the object is for this time of a class derived from its own, which looks up what is checked. The
derived class is made once for each class: what holds nothing of a training run can be kept, and Python, which remembers
of each class how its attributes are found, need not find out anew in every pass over the data (12 us a step of SGD).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MAX_CLASSES = 32


@dataclass(frozen=True, slots=True)
class _Watched:
    """One object for a time."""

    original: type
    derived: type
    checks: list[Callable[[], None]]


_WATCHED: dict[tuple[int, str], _Watched] = {}
"""By the object's id, which is its own while it is watched, and the method's name."""


@contextmanager
def checked_before(owner: Any, name: str, check: Callable[[], None]) -> Iterator[None]:
    """Runs ``check`` before each call of a method of one object; leaves the object as it was.

    Objects that cannot be of another class (one with ``__slots__``, say) are not watched. Several may watch one object,
    and end in any order.
    """
    key = id(owner), name
    watched = _WATCHED.get(key)
    if watched is None:
        original = type(owner)
        derived = _derived(original, name)
        try:
            owner.__class__ = derived
        except TypeError:
            yield
            return
        watched = _WATCHED[key] = _Watched(original, derived, [])
    watched.checks.append(check)
    try:
        yield
    finally:
        watched.checks.remove(check)
        if not watched.checks:
            del _WATCHED[key]
            if type(owner) is watched.derived:
                owner.__class__ = watched.original


@functools.lru_cache(_MAX_CLASSES)
def _derived(original: type, name: str) -> type:
    """A class like ``original``, one method of which runs the checks of its object first."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched = _WATCHED.get((id(self), name))  # None where somebody wrapped the method meanwhile and has kept it
        if watched is not None:
            for check in watched.checks:
                check()
        return getattr(original, name)(self, *args, **kwargs)  # as it is by now: classes get patched

    def reduced(self: Any, protocol: Any) -> Any:  # what is pickled meanwhile is of the class that can be found again
        reduce: Any = original.__reduce_ex__
        made, arguments, *rest = reduce(self, 1)  # higher ones compare the classes
        return (made, tuple(original if argument is derived else argument for argument in arguments), *rest)

    members = {name: functools.wraps(getattr(original, name))(checked), "__reduce_ex__": reduced}
    derived: Any = type(original.__name__, (original,), members)
    derived.__module__, derived.__qualname__ = original.__module__, original.__qualname__
    return derived
