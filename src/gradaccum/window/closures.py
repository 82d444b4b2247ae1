"""What a function of the user's uses, read off its code without running it: attributes, and objects it has closed over.

Followed are closures, globals that are named, defaults, partial arguments, methods of the object it is bound to, and
functions it calls, a few deep. Nothing of torch's or of this library is followed. What is made while it runs, or lies
in containers of containers, is not seen: no answer is no proof.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_MAX_DEPTH = 4
_MAX_ITEMS = 64
_CONTAINERS = (list, dict, set, deque)
_CODE = (type, ModuleType, FunctionType, MethodType, functools.partial)
_PUTTING = frozenset(["__setitem__", "append", "appendleft", "extend", "insert", "add", "update", "setdefault"])


@dataclass(slots=True)
class Uses:
    """What a function uses.

    Attributes:
        attributes: names of attributes and methods that are read.
        chains: pairs of names, the second an attribute of the first, which is an attribute or a local variable.
        stored: names of attributes that are set.
        computes: whether there is arithmetic.
        modules: networks that it has at hand.
        kept: ids of what it could keep something in: lists, dicts, sets, objects.
        puts: whether there is code that puts something into one.
    """

    attributes: set[str] = field(default_factory=set)
    chains: set[tuple[str, str]] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    computes: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    puts: bool = False


def uses_of(function: Callable[..., Any]) -> Uses:
    """What a function uses; nothing, where it is not written in Python."""
    found = Uses()
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(inspect.unwrap(function), 0)]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.modules.append(value)
            if value is not function:
                continue
        elif isinstance(value, _CONTAINERS) or (hasattr(value, "__dict__") and not isinstance(value, _CODE)):
            found.kept.add(id(value))
        todo.extend((one, depth + 1) for one in _below(value, found))
    return found


def closed_over(function: Callable[..., Any], models: Sequence[nn.Module]) -> list[nn.Module]:
    """Networks that a function has at hand besides the models it trains: a discriminator, a teacher."""
    own = {id(module) for model in models for module in model.modules()}
    return [module for module in uses_of(function).modules if id(module) not in own]


def place_of(function: Any) -> str:
    """The function's name, and the line where it is written."""
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    code = getattr(getattr(inner, "__func__", inner), "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def is_torchs(function: Any) -> bool:
    """Whether a function is torch's, or this library's, own."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] in ("torch", "gradaccum")


def _below(value: Any, found: Uses) -> Iterator[Any]:
    """What to look at next; notes what the code of a function does."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__
        for name in _names(value.__func__):
            method = getattr(type(value.__self__), name, None)
            if isinstance(method, FunctionType):
                yield method
            else:
                yield getattr(value.__self__, "__dict__", {}).get(name)
    elif isinstance(value, FunctionType):
        if is_torchs(value):
            return
        for code in _codes(value.__code__):
            _note(code, found)
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__globals__[name] for name in _names(value) if name in value.__globals__)
    elif isinstance(value, Mapping):
        yield from list(value.values())[:_MAX_ITEMS]
    elif isinstance(value, (list, tuple, set)):
        yield from list(value)[:_MAX_ITEMS]
    elif callable(value) and not isinstance(value, type) and not is_torchs(type(value)):
        call: Any = type(value).__call__
        if isinstance(call, FunctionType):
            yield MethodType(call, value)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _codes(code: CodeType) -> Iterable[CodeType]:
    """A function's code, and that of the functions it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(function: Any) -> list[str]:
    return [name for code in _codes(function.__code__) for name in code.co_names]


def _note(code: CodeType, found: Uses) -> None:
    before = ""
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            found.attributes.add(name)
            found.chains.add((before, name))
            found.puts = found.puts or name in _PUTTING
        elif kind == "STORE_ATTR":
            found.stored.add(name)
            found.puts = True
        elif kind in ("STORE_SUBSCR", "STORE_GLOBAL"):
            found.puts = True
        elif kind.startswith(("BINARY_OP", "BINARY_TRUE", "BINARY_MUL")):
            found.computes = True
        if kind.startswith("LOAD"):
            before = name if isinstance(name, str) else ""
