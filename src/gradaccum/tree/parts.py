"""What a batch is made of: its tensors, its lists, and how many samples each of them may have.

What a part cannot say of itself (is this list one of samples, or of columns?) is left open here; `layout` decides it
from what the others say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BatchError
from gradaccum.tree.nesting import code_of, has_rows, is_plain, parts_of

Axis = int | None | Callable[[Any], Tensor]
Axes = Mapping[str, Axis]
"""Of entries by name ("x", "vision.pixel_values", "0.boxes"): the dimension of the samples, None where all share it, or
a function from the batch to how many rows of dimension 0 each sample has. A list's dimension 0 are its entries."""

Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Entries:
    """One entry of a list for each sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """Rows ``bounds[i]`` to ``bounds[i + 1]`` of dimension 0 belong to sample i."""

    bounds: Tensor


Along = int | Entries | Counted | None
"""Where a part has its samples: a dimension, its entries, counted rows; None where all samples share it."""


@dataclass(slots=True, kw_only=True)
class Part:
    """One part of a batch, and what is known of it by itself."""

    path: Path
    code: str
    value: Any
    along: Along = None
    count: int | None = None  # samples that it certainly has
    length: int | None = None  # entries that may be one for each sample
    inner: list[Part] = field(default_factory=list)  # what it is made of where its entries are columns


class Reader:
    """Takes one batch apart; ``used`` are the names of ``axes`` that it has met."""

    def __init__(self, batch: Any, axes: Axes) -> None:
        self.batch, self.axes = batch, axes
        self.used: set[str] = set()

    def parts(self, value: Any, path: Path, code: str, axis: Any) -> list[Part]:
        """What a value is made of; ``axis`` is that of the container it is in, where the user has said one."""
        name = name_of(path)
        part = Part(path=path, code=code, value=value)
        if name in self.axes:
            self.used.add(name)
            axis = (self.axes[name],)
        if axis is not None:
            return self._said(part, axis[0])
        if isinstance(value, Tensor) or has_rows(value):
            part.along = 0 if has_rows(value) else None
            part.count = _first_size(value) if has_rows(value) else None
            return [part]
        if type(value) in (list, tuple, range):
            return self._sequence(part)
        return self._inside(part, None) if parts_of(value) is not None else [part]

    def _inside(self, part: Part, axis: Any) -> list[Part]:
        value = part.value
        return [
            found
            for key, inner in parts_of(value) or ()
            for found in self.parts(inner, (*part.path, key), part.code + code_of(value, key), axis)
        ]

    def _sequence(self, part: Part) -> list[Part]:
        value: Sequence[Any] = part.value
        first = value[0] if value else None
        if not value or type(value) is range or is_plain(value):
            if part.path == () and value and all(isinstance(entry, (list, tuple, range)) for entry in value):
                return self._columns(part)  # of strings and numbers
            is_objects = bool(value) and all(_is_object(entry) for entry in value)
            part.length, part.count = len(value), len(value) if is_objects else None
            part.along = Entries() if is_objects else None
            return [part]
        if all(isinstance(entry, Tensor) and not entry.dim() for entry in value):
            part.length = len(value)
            return [part] if part.path else self._inside(part, None)
        is_records = all(isinstance(entry, Mapping) or is_dataclass(entry) for entry in value)
        if (is_records and all(type(entry) is type(first) for entry in value)) or (not part.path and _are_pairs(value)):
            part.along, part.count = Entries(), len(value)
            return [part]
        are_lists = all(type(entry) in (list, tuple) for entry in value)
        if not (_are_alike(value) or (are_lists and part.path)):
            return self._inside(part, None)
        part.length, part.inner = len(value), self._inside(part, None)
        return [part] if part.path else self._batch_of_tensors(part)

    def _batch_of_tensors(self, part: Part) -> list[Part]:
        """The batch itself is a list or tuple of tensors that are alike."""
        value = part.value
        same = len({entry.shape[0] for entry in value}) == 1
        if len(value) < 3 or (same and (type(value) is tuple or value[0].dim() not in (2, 3))):
            return part.inner
        if same:
            return [part]
        part.along, part.count = Entries(), len(value)
        return [part]

    def _columns(self, part: Part) -> list[Part]:
        return [
            Part(path=(i,), code=f"batch[{i}]", value=column, length=len(column)) for i, column in enumerate(part.value)
        ]

    def _said(self, part: Part, axis: Axis) -> list[Part]:
        """A part of which the user has said how it has its samples."""
        value = part.value
        is_list = type(value) in (list, tuple, range) and not hasattr(value, "_fields")
        if axis is None or value is None:
            return [part]
        if callable(axis) and (has_rows(value) or is_list):
            counts = _checked_counts(axis(self.batch), part, len(value))
            part.along = Counted(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
            part.count = len(counts)
        elif is_list and axis == 0:
            part.along, part.count = Entries(), len(value)
        elif has_rows(value) and not callable(axis):
            dims = len(value.shape)
            if not -dims <= axis < dims or (isinstance(value, Tensor) and value.is_nested and axis):
                raise BatchError(
                    f"axes={{{name_of(part.path)!r}: {axis}}}: {part.code} has shape {tuple(value.shape)}, and no "
                    f"dimension {axis} that samples could be cut along. Pass one from 0 to {dims - 1}, or None for "
                    "what all samples share."
                )
            part.along = axis % dims
            part.count = int(value.shape[axis])
        elif parts_of(value) is not None:
            return self._inside(part, (axis if callable(axis) or not is_list else axis - 1,))
        return [part]


def possible_rows(part: Part) -> set[int | None] | None:
    """How many samples a part can have; None for any number."""
    if part.inner:
        return {part.length} | rows_as_columns(part)
    return None if part.count is None else {part.count}


def rows_as_columns(part: Part) -> set[int | None]:
    """How many samples a list can have if its entries are columns."""
    possible = [found for inner in part.inner if (found := possible_rows(inner)) is not None]
    return set.intersection(*possible) if possible else set()


def inner_leaves(part: Part) -> list[Part]:
    """The parts without parts of their own."""
    return [leaf for inner in part.inner for leaf in inner_leaves(inner)] if part.inner else [part]


def _first_size(value: Any) -> int:
    return value.size(0) if isinstance(value, Tensor) else int(value.shape[0])  # a nested tensor has no shape


def _are_alike(values: Sequence[Any]) -> bool:
    """Whether they may be samples of one data set: tensors of as many dimensions and one type."""
    return all(map(has_rows, values)) and len({(value.ndim, value.dtype) for value in values}) == 1


def _are_pairs(values: Sequence[Any]) -> bool:
    """Whether it is a list of samples such as (picture, label): each as long, with the same unlike kinds."""
    if type(values) is not list:
        return False
    kinds = {tuple(map(_kind, value)) if type(value) in (list, tuple) else None for value in values}
    kind = kinds.pop()
    return not kinds and kind is not None and len(set(kind)) > 1


def _kind(value: Any) -> Any:
    return (type(value), has_rows(value))


def _is_object(value: Any) -> bool:
    """Whether it is of a class of somebody's own: a picture, a graph."""
    return not (
        value is None
        or isinstance(value, (str, bytes, int, float, complex, Sequence, Mapping, Tensor, type))
        or hasattr(value, "__array__")
    )


def _checked_counts(counts: Any, part: Part, rows: int) -> Tensor:
    name = name_of(part.path)
    is_right = (
        isinstance(counts, Tensor) and counts.dim() == 1 and not (counts.is_floating_point() or counts.is_complex())
    )
    if not is_right:
        kind = f"shape {tuple(counts.shape)}, {counts.dtype}" if isinstance(counts, Tensor) else type(counts).__name__
        raise BatchError(
            f"axes[{name!r}](batch) returned {kind}. Return a LongTensor with one number for each sample: how many "
            f"rows of {part.code} belong to it."
        )
    counts = counts.detach().cpu().long()
    if int(counts.sum()) != rows or bool((counts < 0).any()):
        raise BatchError(
            f"axes[{name!r}](batch) counts {int(counts.sum())} rows for {len(counts)} samples, and {part.code} has "
            f"{rows}. Rows would go to the wrong samples. Return how many of them belong to each sample, in order."
        )
    return counts


def name_of(path: Path) -> str:
    """The name of a part, as in ``axes``."""
    return ".".join(map(str, path))
