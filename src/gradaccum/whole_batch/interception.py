"""Calls that are answered by a batch while it runs: of a function of torch's, or of the library's own.

A function of torch's can only be replaced for the whole process, because a model's code names it as it likes. So it is
replaced only while a batch runs that needs it, and the replacement itself holds nothing: it asks who runs in the
calling thread, and passes on what nobody answers. Trainers in threads of their own share one replacement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Handler = Callable[[Any], Any]
"""From a call to its answer; None where the call is another batch's."""


class Handlers:
    """Who answers the calls of one function.

    A forward runs in one thread, and its handler answers that thread's calls. A checkpoint runs a forward again in the
    backward, in whatever thread autograd's engine has: its handlers are asked in turn, the latest first.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._in_backward: list[Handler] = []

    @contextmanager
    def in_forward(self, handler: Handler) -> Iterator[None]:
        """Context manager in which this thread's calls are answered by the handler."""
        before = getattr(self._here, "handler", None)
        self._here.handler = handler
        try:
            yield
        finally:
            self._here.handler = before

    @contextmanager
    def in_backward(self, handler: Handler) -> Iterator[None]:
        """Context manager in which calls outside of any forward are offered to the handler."""
        self._in_backward.append(handler)
        try:
            yield
        finally:
            self._in_backward.remove(handler)

    def answer(self, call: Any) -> Any:
        """The answer of whoever the call belongs to; None where it is nobody's."""
        handler: Handler | None = getattr(self._here, "handler", None)
        if handler is not None:
            return handler(call)
        return next((found for one in reversed(self._in_backward) if (found := one(call)) is not None), None)


class Replacement:
    """A function of a module or class that is replaced while anybody holds it; `original` is for what it passes on."""

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._torchs = self._original = getattr(owner, name)
        self._lock = threading.Lock()
        self._holders = 0
        self._here = threading.local()

        def entry(*args: Any, **kwargs: Any) -> Any:  # a function, which Python binds to an instance like a method
            if getattr(self._here, "is_inside", False):  # called by a wrapper of somebody's that `original` has called
                return self._torchs(*args, **kwargs)
            return replacement(*args, **kwargs)

        self._entry = entry

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which the function is replaced; holders may end in any order."""
        with self._lock:
            if self._holders == 0:
                if (found := getattr(self._owner, self._name)) is not self._entry:
                    self._original = found
                setattr(self._owner, self._name, self._entry)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    # Else somebody has wrapped the replacement meanwhile, and keeps the wrapper.
                    if getattr(self._owner, self._name) is self._entry:
                        setattr(self._owner, self._name, self._original)
                    self._original = self._torchs

    def original(self, *args: Any) -> Any:
        """Calls what was there before, which may be a wrapper that somebody has put around the replacement."""
        self._here.is_inside = True
        try:
            return self._original(*args)
        finally:
            self._here.is_inside = False
