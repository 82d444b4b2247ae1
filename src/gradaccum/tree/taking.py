"""The rows of some samples, in the batch's own structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BatchError
from gradaccum.tree.layout import Layout, read
from gradaccum.tree.nesting import has_rows, parts_of, with_parts
from gradaccum.tree.parts import Along, Axes, Counted, Entries, Path, name_of
from gradaccum.types import Rows


def take(
    batch: Any,
    which: Rows,
    layout: Layout | None = None,
    *,
    axes: Axes | None = None,
    before_cut: Callable[[Any, int], Any] | None = None,
) -> Any:
    """The given samples of every tensor and column. Slices of tensors are views, nothing is copied.

    Args:
        batch: any nesting of tensors.
        which: samples, in the order they are to have.
        layout: how the batch has been read, where it has been.
        axes: see `Axes`.
        before_cut: called with each tensor and array and the dimension of its samples; what it returns is cut.

    Raises:
        BatchError: see `read`; or a sparse tensor, which cannot be cut.
    """
    return _Taking(which, read(batch, axes) if layout is None else layout, before_cut).of(batch, ())


class _Taking:
    def __init__(self, which: Rows, layout: Layout, before_cut: Callable[[Any, int], Any] | None) -> None:
        self.which, self.along, self.codes, self.before_cut = which, layout.along, layout.codes, before_cut
        # Of jagged tensors. Fields of one offsets tensor share it in the pieces too.
        self.offsets: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, value: Any, path: Path) -> Any:
        if path in self.along:
            return self._cut(value, self.along[path], path)
        parts = parts_of(value)
        if parts is None:
            return value
        return with_parts(value, [self.of(part, (*path, key)) for key, part in parts])

    def _cut(self, value: Any, along: Along, path: Path) -> Any:
        if along is None:
            return value
        which = self.which
        if isinstance(along, Counted):
            which, along = _counted(along.bounds, which), 0 if has_rows(value) else Entries()
        if isinstance(along, Entries):
            if isinstance(which, slice) or isinstance(value, range):
                return value[which] if isinstance(which, slice) else [value[i] for i in which.tolist()]
            entries = [value[i] for i in which.tolist()]
            return entries if type(value) is list else type(value)(entries)
        if self.before_cut is not None and which is self.which:  # rows that are counted are not trimmed
            value = self.before_cut(value, along)
        if not isinstance(value, Tensor):
            return _of_array(value, which, along)
        if value.is_nested:
            return self._components(value)
        if value.layout is not torch.strided:
            raise BatchError(
                f"{self.codes[path]} is a {value.layout} tensor of shape {tuple(value.shape)}, which cannot be "
                "cut into the rows of its samples. Pass it dense (x.to_dense()), as a list of one tensor for each "
                "sample, or, where all "
                f"samples share it, name it: split=ga.split_by_samples(axes={{{name_of(path)!r}: None}})."
            )
        if isinstance(which, slice):
            return value[which] if along == 0 else value[(*[slice(None)] * along, which)]
        return value.index_select(along, which.to(value.device))

    def _components(self, value: Tensor) -> Tensor:
        """A nested tensor of some of its components."""
        index = range(value.size(0))[self.which] if isinstance(self.which, slice) else self.which.tolist()
        if value.layout is not torch.jagged or value._ragged_idx != 1 or value.lengths() is not None:  # type: ignore[attr-defined]
            components = value.unbind()
            return torch.nested.as_nested_tensor([components[i] for i in index], layout=value.layout)
        # Fields of one offsets tensor have the same ragged size, and may be added to each other; pieces of them must.
        offsets: Tensor = value.offsets()  # type: ignore[attr-defined]
        if id(offsets) not in self.offsets:
            chosen = torch.as_tensor(list(index), dtype=torch.long)
            rows = _counted(offsets.cpu(), chosen)
            lengths = offsets.diff().cpu()[chosen]
            fresh = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(offsets)
            self.offsets[id(offsets)] = fresh, rows
        fresh, rows = self.offsets[id(offsets)]
        values = value.values()
        return torch.nested.nested_tensor_from_jagged(values.index_select(0, rows.to(values.device)), fresh)


def _counted(bounds: Tensor, which: Rows) -> Any:
    """The rows that belong to these samples."""
    if isinstance(which, slice):
        start, stop, _ = which.indices(len(bounds) - 1)
        return slice(int(bounds[start]), int(bounds[max(start, stop)]))
    spans = [torch.arange(int(bounds[i]), int(bounds[i + 1])) for i in which.tolist()]
    return torch.cat(spans) if spans else torch.arange(0)


def _of_array(value: Any, which: Rows, along: int) -> Any:
    """Rows of a numpy array: a tensor where it holds numbers that torch has, and otherwise an array still."""
    picked = value[(*[slice(None)] * along, which.numpy() if isinstance(which, Tensor) else which)]
    try:
        return torch.from_numpy(picked.copy())  # some arrays cannot be written to, or run backwards
    except (TypeError, AttributeError):
        return picked
