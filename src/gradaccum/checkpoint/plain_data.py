"""States as plain data: what is saved can be loaded again, and loading it runs no code.

``torch.load(weights_only=True)`` reads tensors, numbers, strings and the containers of these. Torch writes much more
than that, and says so when the file is read, which is after the run that made it has gone. So every state is looked
through before it is written: a few kinds of values that are data in the clothes of a class (numpy numbers and arrays,
paths, times, fractions, ...) are written as dicts that name their kind, and built anew when they are read; what is
left is refused, by the key under which it stands.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import io
import pathlib
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.errors import StateError

_KIND, _VALUE = "gradaccum kind", "value"
_ATOMS: frozenset[type] = frozenset(
    (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device, torch.layout)
)
_FACTORIES: dict[str, Callable[[], Any]] = {one.__name__: one for one in (int, float, bool, str, list, dict, set)}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A class whose values are written as plain data: what they are made of, and how they are made of it."""

    cls: type
    parts: Callable[[Any], Any]
    make: Callable[[Any], Any]


def _factory_name(value: collections.defaultdict[Any, Any]) -> str | None:
    factory = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        raise TypeError("its default_factory is a function")
    return name


_KINDS: dict[str, _Kind] = {
    "deque": _Kind(collections.deque, lambda v: [list(v), v.maxlen], lambda p: collections.deque(p[0], p[1])),
    "defaultdict": _Kind(
        collections.defaultdict,
        lambda v: [_factory_name(v), [list(pair) for pair in v.items()]],
        lambda p: collections.defaultdict(None if p[0] is None else _FACTORIES[p[0]], p[1]),
    ),
    "frozenset": _Kind(frozenset, list, frozenset),
    "range": _Kind(range, lambda v: [v.start, v.stop, v.step], lambda p: range(*p)),
    "slice": _Kind(slice, lambda v: [v.start, v.stop, v.step], lambda p: slice(*p)),
    "path": _Kind(type(pathlib.Path()), str, pathlib.Path),
    "datetime": _Kind(datetime.datetime, lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    "date": _Kind(datetime.date, lambda v: v.isoformat(), datetime.date.fromisoformat),
    "time": _Kind(datetime.time, lambda v: v.isoformat(), datetime.time.fromisoformat),
    "timedelta": _Kind(
        datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds], lambda p: datetime.timedelta(*p)
    ),
    "fraction": _Kind(fractions.Fraction, str, fractions.Fraction),
    "decimal": _Kind(decimal.Decimal, str, decimal.Decimal),
    "uuid": _Kind(uuid.UUID, str, uuid.UUID),
    "namespace": _Kind(types.SimpleNamespace, lambda v: dict(vars(v)), lambda p: types.SimpleNamespace(**p)),
}
_KIND_OF = {kind.cls: name for name, kind in _KINDS.items()}
_ARRAY = "numpy array"


def as_plain_data(value: Any, where: str) -> Any:
    """Returns the same state as what ``torch.load(weights_only=True)`` reads; tensors are not copied.

    Args:
        value: a ``state_dict()``, or any part of one.
        where: the object's name, by which an error says what it found.

    Raises:
        StateError: something in it could not be loaded again.
    """
    cls = type(value)
    if cls in _ATOMS or cls is Tensor or cls is nn.Parameter:
        return value
    if cls in (dict, collections.OrderedDict, collections.Counter):
        if _KIND in value:
            raise StateError(f"{where} has a key {_KIND!r}, under which Checkpoint keeps notes. Use another name.")
        return cls({_key(key, where): as_plain_data(one, f"{where}[{key!r}]") for key, one in value.items()})
    if cls in (list, tuple):
        return cls(as_plain_data(one, f"{where}[{i}]") for i, one in enumerate(value))
    if cls is set:
        return {_key(one, where) for one in value}
    if cls in _KIND_OF:
        name = _KIND_OF[cls]
        try:
            parts = _KINDS[name].parts(value)
        except TypeError as error:
            raise _refused(value, where) from error
        return {_KIND: name, _VALUE: as_plain_data(parts, where)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        number = value.item()
        if not isinstance(number, numpy.generic):  # an np.longdouble is its own
            return as_plain_data(number, where)
    if numpy is not None and cls is numpy.ndarray and not value.dtype.hasobject:
        return {_KIND: _ARRAY, _VALUE: [value.dtype.str, list(value.shape), value.tobytes()]}
    if not _can_be_loaded(value):
        raise _refused(value, where)
    return value


def from_plain_data(value: Any) -> Any:
    """Returns the state from which `as_plain_data` has made the value.

    Raises:
        StateError: it names a kind that is not known here.
    """
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(from_plain_data, value))
    if not isinstance(value, Mapping) or isinstance(value, collections.Counter):
        return value
    if _KIND not in value:
        pairs = [(key, from_plain_data(one)) for key, one in value.items()]
        return collections.OrderedDict(pairs) if isinstance(value, collections.OrderedDict) else dict(pairs)
    name, parts = value[_KIND], from_plain_data(value[_VALUE])
    if name == _ARRAY:
        import numpy

        dtype, shape, content = parts
        return numpy.frombuffer(content, dtype=numpy.dtype(dtype)).reshape(shape).copy()
    if name not in _KINDS:
        raise StateError(
            f"The checkpoint holds a {name!r}, which this version of gradaccum cannot build; it was saved by a later "
            "one. Go on with that version."
        )
    return _KINDS[name].make(parts)


def _key(key: Any, where: str) -> Any:
    plain = as_plain_data(key, f"a key of {where}")
    if isinstance(plain, dict):
        raise _refused(key, f"a key of {where}")
    return plain


def _can_be_loaded(value: Any) -> bool:
    """Whether torch reads what it writes of a value: classes that the user has declared safe, tensors of their own."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is, it would be raised again by load()
        return False
    return True


def _refused(value: Any, where: str) -> StateError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    cls = type(value)
    return StateError(
        f"The state of {where} is a {cls.__module__}.{cls.__qualname__} ({shown}), which could be saved and never be "
        "loaded: checkpoints are read as data, without running code. Nothing was saved. Let state_dict() return "
        "numbers, strings, tensors and lists or dicts of these (an Enum's value, a dataclass by dataclasses.asdict), "
        f"or declare the class: torch.serialization.add_safe_globals([{cls.__name__}])."
    )
