"""Which parts of a batch have samples, and along what.

    a tensor or an array                              dimension 0 (of a nested tensor: its components)
    a list of dicts, dataclasses or objects           one sample each
    a list or tuple of tensors that are alike         columns where their rows agree with the rest of the batch, samples
                                                      where it is the list's length that agrees
    numbers, strings, ranges, 0-d tensors in a list   a column where there is one for each sample; else shared
    everything else                                   shared by all samples

What could be read in two ways, and what in none, is an error that shows both and names ``axes=``: a guess would pair
samples with the targets of others. The batch itself is a container of columns; if it is a list of tensors, that holds
for up to two of them, for vectors, and for batches of images: three or more tensors of two or three dimensions may
as well be so many samples.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch import Tensor

from gradaccum.errors import BatchError
from gradaccum.tree.disagreement import rows_disagree, two_readings
from gradaccum.tree.nesting import parts_of, tensors
from gradaccum.tree.parts import (
    Along,
    Axes,
    Entries,
    Part,
    Path,
    Reader,
    inner_leaves,
    name_of,
    possible_rows,
    rows_as_columns,
)

logger = logging.getLogger("gradaccum")
_NO_ROWS = {int, float, bool, str, bytes, NoneType}  # nor do lists of these count where there is a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a batch has been read.

    Attributes:
        rows: samples; None where nothing has any.
        along: where each part has them, by the keys that lead to it.
        codes: the code that leads to each.
        columns: lists of numbers, strings and the like by their keys, for a later batch to be compared with.
        tensors: references to the batch's tensors, which tell whether a batch is this one.
        batch_id: that of the batch itself, which tells the same while its tensors live.
    """

    rows: int | None
    along: Mapping[Path, Along]
    codes: Mapping[Path, str]
    columns: Mapping[Path, Any]
    tensors: Sequence[weakref.ref[Tensor]]
    batch_id: int

    def is_of(self, batch: Any) -> bool:
        """Whether the batch has the tensors that were read, of which there is one at least."""
        if id(batch) == self.batch_id and self.tensors and self.tensors[0]() is not None:
            return True
        found = list(tensors(batch))
        return 0 < len(found) == len(self.tensors) and all(
            reference() is tensor for reference, tensor in zip(self.tensors, found, strict=True)
        )

    def parts_of(self, batch: Any) -> Iterator[tuple[Path, Any]]:
        """The parts of a batch that is laid out like this one, by the keys that lead to them."""
        for path in self.along:
            part = batch
            for key in path:
                part = dict(parts_of(part) or ())[key]
            yield path, part

    def __str__(self) -> str:
        said: dict[str, list[str]] = {}
        for path, along in self.along.items():
            said.setdefault(_in_words(along), []).append(self.codes[path])
        return f"{self.rows} samples: " + "; ".join(f"{what}: {', '.join(codes)}" for what, codes in said.items())


def rows_or_none(batch: Any) -> int | None:
    """The number of samples; None where nothing has any, or where it could only be guessed."""
    found = _rows_at_a_glance(batch)
    if found is not None:
        return found
    try:
        layout = read(batch, only_counts=True)
    except BatchError:
        return None
    if layout.rows == 1 and isinstance(layout.along.get(()), Entries) and rows_or_none(batch[0]) not in (None, 1):
        return None  # a list of one dict: one sample, or what some loaders make of a batch
    return layout.rows


def rows(batch: Any, axes: Axes | None = None) -> int:
    """The number of samples of a batch.

    Raises:
        BatchError: nothing has samples, two parts disagree, or it could only be guessed.
    """
    found = _rows_at_a_glance(batch) if axes is None else None
    return rows_of(batch, read(batch, axes, only_counts=True)) if found is None else found


def rows_of(batch: Any, layout: Layout) -> int:
    """The number of samples of a batch that has been read; an error where there is none."""
    if layout.rows is None:
        raise BatchError(
            f"The batch ({type(batch).__name__}) holds no tensor with a first dimension, so it cannot be seen how many "
            "samples it has. Without that count its loss would get the wrong share of the gradient. Pass tensors "
            "whose index 0 is the sample, in tuples, lists, dicts or dataclasses."
        )
    return layout.rows


def _rows_at_a_glance(batch: Any) -> int | None:
    """The rows of the plainest batches, tensors in a tuple, a list or a dict. None for all others.

    Called for every micro-batch of one's own loop, so it takes microseconds.
    """
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() and not batch.is_nested else None
    kind = type(batch)
    if kind is not dict and kind is not tuple and kind is not list:
        return None
    found: int | None = None
    for column in batch.values() if kind is dict else batch:
        if not isinstance(column, Tensor):
            if type(column) in _NO_ROWS or (type(column) is list and set(map(type, column)) <= _NO_ROWS):
                continue
            return None
        if not column.dim() or column.is_nested:
            return None
        size = column.size(0)
        if found is not None and size != found:
            return None
        found = int(size)
    if kind is list and len(batch) > 2:  # a longer list of tensors that are alike may be one of samples
        kinds = {(column.dtype, column.dim()) for column in batch if isinstance(column, Tensor)}
        if len(kinds) == 1 and kinds.pop()[1] in (2, 3):
            return None
    return found


def _plain_layout(batch: Any) -> Layout | None:
    """The layout of the plainest batches, of tensors alone; read for every update, so it takes microseconds."""
    rows = _rows_at_a_glance(batch)
    if rows is None:
        return None
    if isinstance(batch, Tensor):
        columns: dict[Path, Tensor] = {(): batch}
    else:
        columns = {(key,): column for key, column in (batch.items() if type(batch) is dict else enumerate(batch))}
    if not all(isinstance(column, Tensor) for column in columns.values()):
        return None
    return Layout(
        rows=rows,
        along=dict.fromkeys(columns, 0),
        codes={path: f"batch[{path[0]!r}]" if path else "batch" for path in columns},
        columns={},
        tensors=[weakref.ref(column) for column in columns.values()],
        batch_id=id(batch),
    )


def read(
    batch: Any,
    axes: Axes | None = None,
    before: Layout | None = None,
    *,
    is_next: bool = False,
    only_counts: bool = False,
) -> Layout:
    """Reads which parts of a batch have samples, and along what.

    Args:
        batch: any nesting of tensors.
        axes: what the user has said of it.
        before: how an earlier batch was read, which decides what this one alone leaves open.
        is_next: whether that was another batch of the same run: a list that both have is a setting.
        only_counts: whether samples are only counted: what has as many either way is no matter then.

    Raises:
        BatchError: parts disagree, or one could be read in two ways, or in none.
    """
    plain = None if axes else _plain_layout(batch)
    if plain is not None:
        return plain
    reader = Reader(batch, axes or {})
    parts = reader.parts(batch, (), "batch", None)
    unknown = [name for name, axis in reader.axes.items() if name not in reader.used and not callable(axis)]
    if unknown:
        raise BatchError(
            f"axes= names {unknown[0]!r}, and the batch has no such entry; it has "
            f"{', '.join(repr(name_of(part.path)) for part in parts[:8])}. What it says would be ignored. Names "
            'are keys, fields and indices joined by dots: "vision.pixel_values", "0.boxes".'
        )
    return _Resolving(batch, before, is_next, only_counts).resolved(parts, _agreed_rows(parts))


class _Resolving:
    """Decides what parts leave open."""

    def __init__(self, batch: Any, before: Layout | None, is_next: bool, only_counts: bool) -> None:
        self._batch, self._before, self._is_next, self._only_counts = batch, before, is_next, only_counts

    def resolved(self, parts: list[Part], rows: int | None) -> Layout:
        """The layout of these parts, of which each belongs to ``rows`` samples or to none."""
        along: dict[Path, Along] = {}
        has_lists = any(
            isinstance(part.along, Entries)
            or (part.inner and part.length == rows and rows not in rows_as_columns(part))
            for part in parts
        )
        waiting, found = list(reversed(parts)), []
        while waiting:
            part = waiting.pop()
            if part.inner and not self._is_list_of_samples(part, rows, has_lists, parts):
                waiting.extend(reversed(part.inner))
                continue
            if part.inner or (part.count is None and part.length == rows and part.length and not self._is_shared(part)):
                part.along = Entries()
            along[part.path] = part.along
            found.append(part)
        return Layout(
            rows=rows,
            along=along,
            codes={part.path: part.code for part in found},
            columns={part.path: part.value for part in found if part.length and part.count is None and not part.inner},
            tensors=[weakref.ref(tensor) for tensor in tensors(self._batch)],
            batch_id=id(self._batch),
        )

    def _is_list_of_samples(self, part: Part, rows: int | None, has_lists: bool, parts: list[Part]) -> bool:
        as_samples, as_columns = part.length == rows, rows in rows_as_columns(part)
        if as_samples and as_columns and rows != 1:  # of a single sample, both take the same
            known = () if self._before is None else self._before.along
            if part.path in known:
                return True
            if any(path[: len(part.path)] == part.path for path in known):
                return False
            if not (has_lists or self._only_counts):
                raise two_readings(part)
            return True
        if not as_samples and not as_columns:
            certain = next((one for one in parts if one.count is not None), part)
            odd = next((one for one in inner_leaves(part) if one.count != rows), part)
            raise rows_disagree(certain, odd, of=part)
        return not as_columns

    def _is_shared(self, part: Part) -> bool:
        """Whether a list of as many numbers as there are samples is a setting, as an earlier batch shows."""
        before = self._before
        if before is None or part.path not in before.columns:
            return False
        value, was_shared = before.columns[part.path], before.along[part.path] is None
        if was_shared and (value is part.value or len(value) == part.length != before.rows):
            return True
        is_shared = value is part.value and self._is_next and bool(before.tensors)
        if is_shared:
            logger.warning(
                "%s is the same object in two batches, and is taken for a setting that all samples share; if it has an "
                "entry for each sample: ga.split_by_samples(axes={%r: 0}), and None for a setting",
                part.code,
                name_of(part.path),
            )
        return is_shared


def _agreed_rows(parts: Sequence[Part]) -> int | None:
    """The number of samples that all parts go with; None where none has any."""
    certain = [part for part in parts if part.count is not None]
    if certain:
        if all(part.count == certain[0].count for part in certain):
            return certain[0].count
        number = Counter(part.count for part in certain).most_common(1)[0][0]
        first = next(part for part in certain if part.count == number)
        raise rows_disagree(first, next(part for part in certain if part.count != number), parts=certain)
    lists = [part for part in parts if part.inner]
    lengths = {part.length for part in parts if part.length and not part.inner}
    if not lists:
        if len(lengths) > 1:
            columns = [part for part in parts if part.length]
            odd = next(part for part in columns if part.length != columns[0].length)
            raise rows_disagree(columns[0], odd)
        if not lengths and any(part.length == 0 and type(part.value) is list for part in parts):
            return 0  # lists of no samples: the share of a process that has none
        return lengths.pop() if lengths else None
    possible = set.intersection(*(possible_rows(part) or set() for part in lists))
    if len(possible) > 1 and possible & lengths:
        possible &= lengths
    if len(possible) > 1:
        raise two_readings(lists[0])
    if not possible:
        raise rows_disagree(lists[0], lists[-1] if len(lists) > 1 else inner_leaves(lists[0])[-1], of=lists[-1])
    return possible.pop()


def _in_words(along: Along) -> str:
    if along is None:
        return "shared"
    if isinstance(along, int):
        return f"dimension {along}"
    return "by their entries" if isinstance(along, Entries) else "by counted rows"
