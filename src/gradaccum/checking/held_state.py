"""What functions, and objects that they hold, keep from one call to the next: noted before a run, put back after it.

Followed are closures, defaults, globals that the code names, partial arguments, methods and their objects. Put back are
the names that code may bind anew (cells, globals, attributes, slots, simple class attributes), containers, arrays, and
generators of random numbers. Objects of other packages than the function's own are left alone below the first one:
they may hold threads and files.

An iterator that cannot be copied (a generator, the iterator of a loader) would be one item further on after the run.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import io
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.fit.borrowed_model import is_namespace, remember

_MOST_COPIED_BYTES = 16 * 2**20  # of an array
_MOST_ENTRIES = 10_000  # of a container: more are data, no counters
_MOST_VISITED = 1_000  # objects that are reached through functions
_CONTAINERS = (list, dict, set, deque)
_HELD = (nn.Module, Tensor, torch.Generator, random.Random, functools.partial, *_CONTAINERS)
_ITERATORS = (itertools.count, type(iter(range(0))), type(iter([])), type(iter(())))  # that can be copied
_LIBRARIES = ("torch", "numpy", "gradaccum")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class CannotLook(Exception):
    """Why a batch cannot be looked at."""


class HeldState:
    """Has ``undone`` put back what is held by what is added.

    Args:
        undone: runs at the end.
        remembered: ids of what is put back already.
        add_module: takes modules that are met, with the name that holds them.
        watch: takes tensors that may be written.
    """

    def __init__(
        self,
        undone: ExitStack,
        remembered: set[int],
        *,
        add_module: Callable[[nn.Module, str], None],
        watch: Callable[[list[Tensor]], None],
    ) -> None:
        self._undone, self._remembered = undone, remembered
        self._add_module, self._watch = add_module, watch
        self._visited: set[int] = set()
        self._classes: set[type] = set()
        self._packages: set[str] = set()  # of the user's functions
        self._names: set[str] = set()  # in their code
        self._drawn_from: list[str] = []  # attributes that hold iterators which cannot be copied

    def add(self, value: Any, name: str) -> None:
        """What a function, or an object that is called like one, holds and may change."""
        if isinstance(value, _SIMPLE) or id(value) in self._visited or len(self._visited) > _MOST_VISITED:
            return
        self._visited.add(id(value))
        if isinstance(value, nn.Module):
            self._add_module(value, name)
        elif isinstance(value, Tensor):
            self._watch([value])
        elif isinstance(value, _CONTAINERS):
            if len(value) <= _MOST_ENTRIES and not is_namespace(value):
                remember(value, self._remembered, self._undone)
                for entry in list(value.values() if isinstance(value, dict) else value):
                    self.add(entry, name)
        elif isinstance(value, functools.partial):
            for held in (value.func, *value.args, *value.keywords.values()):
                self.add(held, name)
        elif inspect.ismethod(value):
            self.add(value.__func__, name)
            self._add_holder(value.__self__, name)
        elif inspect.isfunction(value):
            self._add_function(value)
        elif not self._add_generator(value) and is_of_the_user(value):
            self._packages.add(_package_of(type(value)))
            self._add_holder(value, name)

    def refuse_iterators(self) -> None:
        """Looks at what was met by name, once every function has been added.

        Raises:
            CannotLook: code uses an iterator that cannot be put back.
        """
        for name in self._drawn_from:
            if name in self._names:
                raise _draws_from(name)

    def _add_generator(self, value: Any) -> bool:
        """Whether a value is a generator of random numbers, or an array, and is put back."""
        if isinstance(value, torch.Generator):
            remember(value, self._remembered, self._undone)
        elif isinstance(value, random.Random):
            if not isinstance(value, random.SystemRandom):  # which has no state
                self._undone.callback(value.setstate, value.getstate())
        elif is_numpys_generator(value):
            state = value.bit_generator.state
            self._undone.callback(setattr, value.bit_generator, "state", state)
        elif type(value).__module__.startswith("numpy") and type(value).__name__ == "RandomState":
            self._undone.callback(value.set_state, value.get_state())
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.nbytes <= _MOST_COPIED_BYTES and not value.dtype.hasobject and value.flags.writeable:
                self._undone.callback(value.__setitem__, ..., value.copy())
        else:
            return False
        return True

    def _add_holder(self, holder: Any, name: str) -> None:
        """An object with methods: its attributes, and what they hold."""
        if isinstance(holder, nn.Module):
            self.add(holder, name)
            return
        if isinstance(holder, (type, Optimizer)):
            return
        for method in (getattr(type(holder), one, None) for one in ("__call__", "__next__", *sorted(self._names))):
            if isinstance(method, FunctionType):
                self.add(method, name)
        slots = {one: getattr(holder, one) for one in _slots_of(type(holder)) if hasattr(holder, one)}
        for slot, value in slots.items():
            self._undone.callback(setattr, holder, slot, value)
        attributes = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
        self._undone.callback(_put_attributes_back, holder, attributes)
        self.add_class(type(holder))
        for attribute, value in (attributes | slots).items():
            if isinstance(value, _ITERATORS):
                setattr(holder, attribute, copy.copy(value))
            elif _cannot_be_copied(value):
                self._drawn_from.append(attribute)
            elif isinstance(value, _HELD) or inspect.isroutine(value) or self._is_own(value):
                self.add(value, attribute)

    def _is_own(self, value: Any) -> bool:
        """Whether an object is of the same package as the functions, or none that holds more than itself."""
        return type(value).__module__.startswith("numpy") or (
            is_of_the_user(value) and _package_of(type(value)) in self._packages
        )

    def add_class(self, kind: type) -> None:
        """Simple attributes of a class of the user's, counters of all its objects; and its containers."""
        for one in kind.__mro__:
            if one in self._classes or not _is_users(one):
                continue
            self._classes.add(one)
            for name, value in list(vars(one).items()):
                if name.startswith("__"):
                    continue
                if isinstance(value, _SIMPLE):
                    self._undone.callback(_put_class_attribute_back, one, name, value)
                elif isinstance(value, _CONTAINERS):
                    self.add(value, name)

    def _add_function(self, function: Any) -> None:
        package = (function.__module__ or "").partition(".")[0]
        is_users = package not in _LIBRARIES
        if is_users:
            self._packages.add(package)
            self._names.update(name for code in _codes(function.__code__) for name in code.co_names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                held = cell.cell_contents
            except ValueError:  # empty still
                continue
            if is_users and _cannot_be_copied(held):
                raise _draws_from(name)
            self._undone.callback(setattr, cell, "cell_contents", held)  # the function may bind it anew
            if isinstance(held, _ITERATORS):
                cell.cell_contents = copy.copy(held)
            self.add(held, name)
        self._add_defaults(function)
        if is_users:
            self._add_globals(function)

    def _add_globals(self, function: Any) -> None:
        codes = list(_codes(function.__code__))
        bound = {one.argval for code in codes for one in dis.get_instructions(code) if one.opname == "STORE_GLOBAL"}
        for name in dict.fromkeys(name for code in codes for name in code.co_names):
            if name not in function.__globals__:
                continue
            held = function.__globals__[name]
            if _cannot_be_copied(held):
                raise _draws_from(name)
            if name in bound or isinstance(held, _ITERATORS):
                self._undone.callback(function.__globals__.__setitem__, name, held)
            if isinstance(held, _ITERATORS):
                function.__globals__[name] = copy.copy(held)
            self.add(held, name)

    def _add_defaults(self, function: Any) -> None:
        """What a function holds as the defaults of its arguments: ``def loss_fn(model, batch, judge=judge)``."""
        positional, by_name = function.__defaults__ or (), function.__kwdefaults__ or {}
        if any(isinstance(held, _ITERATORS) for held in positional):
            self._undone.callback(setattr, function, "__defaults__", positional)
            function.__defaults__ = tuple(
                copy.copy(held) if isinstance(held, _ITERATORS) else held for held in positional
            )
        code = function.__code__
        names = code.co_varnames[code.co_argcount - len(positional) : code.co_argcount]
        for name, held in (*zip(names, positional, strict=True), *by_name.items()):
            if _cannot_be_copied(held):
                raise _draws_from(name)
            self.add(held, name)


def is_numpys_generator(value: Any) -> bool:
    """Whether a value is a generator of NumPy's newer kind."""
    return type(value).__module__ == "numpy.random._generator"


def is_of_the_user(value: Any) -> bool:
    """Whether an object is of a class that no library known here has made; those hold threads, files and locks."""
    return not isinstance(value, type) and _is_users(type(value))


def _is_users(kind: type) -> bool:
    package = _package_of(kind)
    return package not in _LIBRARIES and package not in sys.stdlib_module_names


def _package_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _cannot_be_copied(value: Any) -> bool:
    """Whether a value hands out items, and there is no way back."""
    if not hasattr(type(value), "__next__") or isinstance(value, (*_ITERATORS, io.IOBase)):
        return False
    return not is_of_the_user(value)  # whose own attributes are put back, and looked at


def _draws_from(name: str) -> CannotLook:
    return CannotLook(f"the loss takes items from {name}, an iterator that cannot be put back")


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _slots_of(kind: type) -> list[str]:
    found: list[str] = []
    for one in kind.__mro__ if _is_users(kind) else ():
        slots = vars(one).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        found += [name for name in names if not name.startswith("__")]
    return found


def _put_class_attribute_back(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)


def _put_attributes_back(holder: Any, attributes: dict[str, Any]) -> None:
    now = getattr(holder, "__dict__", {})
    for name in [name for name in now if name not in attributes]:
        del now[name]
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            now[name] = value
