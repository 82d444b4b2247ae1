"""Nested batches: how many rows they have, pieces of them, and their way to a device.

The only file that knows how batches nest: tensors in tuples, named tuples, lists, dicts, dataclasses and other mappings
(Hugging Face's ``BatchEncoding``), at any depth. Index 0 of every tensor is the sample. What has no rows is shared by
all micro-batches as it is: 0-d tensors, None, numbers, strings. A list without tensors (of strings, numbers, dicts of
these, ...) that has one entry for each row is a column like any other, and is cut along.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gradaccum.errors import BatchError
from gradaccum.types import Rows


def rows(batch: Any) -> int:
    """The number of rows that every tensor in the batch has.

    Raises:
        BatchError: there is no tensor with rows, or two disagree.
    """
    found = rows_or_none(batch)
    if found is None:
        raise BatchError(
            f"The batch ({type(batch).__name__}) holds no tensor with a first dimension, so it cannot be seen how many "
            "samples it has. Without that count its loss would get the wrong share of the gradient. Pass tensors "
            "whose index 0 is the sample, in tuples, lists, dicts or dataclasses."
        )
    return found


def rows_or_none(batch: Any) -> int | None:
    """Like `rows`, but None where nothing in the batch has rows."""
    found: int | None = None
    for leaf in leaves(batch):
        if _has_rows(leaf):
            if found is not None and leaf.shape[0] != found:
                raise _rows_disagree(batch)
            found = int(leaf.shape[0])
    return found


def _rows_disagree(batch: Any) -> BatchError:
    seen = [(path, leaf) for path, leaf in named_leaves(batch, "batch") if _has_rows(leaf)]
    first_path, first = seen[0]
    path, leaf = next((path, leaf) for path, leaf in seen if leaf.shape[0] != first.shape[0])
    return BatchError(
        f"Rows disagree: {first_path} has {first.shape[0]} and {path} has {leaf.shape[0]} (shape {tuple(leaf.shape)}). "
        "Cut along index 0, samples would be paired with the wrong targets. Every tensor of the batch needs one row "
        "for each sample; what all samples share (class weights, say) belongs outside of the batch, in the loss "
        "function."
    )


def take(batch: Any, which: Rows) -> Any:
    """The given rows of every tensor and column, in the batch's own structure. Slices are views, nothing is copied."""

    def pick(leaf: Any) -> Any:
        if _has_rows(leaf):
            if isinstance(leaf, Tensor) and isinstance(which, Tensor):
                return leaf.index_select(0, which.to(leaf.device))
            return leaf[which.numpy() if isinstance(which, Tensor) else which]
        if _is_column(leaf) and len(leaf) == rows(batch):
            picked = leaf[which] if isinstance(which, slice) else [leaf[i] for i in which.tolist()]
            return type(leaf)(picked)
        return leaf

    return map_leaves(batch, pick)


def to_device(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Every tensor on the device. With ``non_blocking``, host tensors bound for CUDA are pinned first."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device == device:
            return leaf
        if non_blocking and leaf.device.type == "cpu" and not leaf.is_pinned():
            leaf = leaf.pin_memory()
        return leaf.to(device, non_blocking=non_blocking)

    return map_leaves(batch, move)


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in the batch, depth first."""
    return (leaf for leaf in leaves(batch) if isinstance(leaf, Tensor))


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure with ``function`` applied to every leaf; columns of strings or numbers are one leaf."""
    if isinstance(tree, Tensor) or _is_column(tree):
        return function(tree)
    if isinstance(tree, Mapping):
        return _rebuilt_mapping(tree, {key: map_leaves(value, function) for key, value in tree.items()})
    if isinstance(tree, (tuple, list)):
        values = [map_leaves(value, function) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)  # a named tuple
        return values if type(tree) is list else type(tree)(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        # Copied and filled, not constructed: __post_init__ may check or compute what holds for whole batches only.
        clone = copy.copy(tree)
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                object.__setattr__(clone, field.name, map_leaves(getattr(tree, field.name), function))
        return clone
    return function(tree)


def _rebuilt_mapping(original: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return values
    if dataclasses.is_dataclass(original):  # Hugging Face's ModelOutput is a dataclass and a mapping
        return dataclasses.replace(original, **values)
    try:
        rebuilt = type(original)(values)  # type: ignore[call-arg]
        if list(rebuilt) == list(values):
            return rebuilt
    except TypeError:
        pass
    clone: Any = copy.copy(original)  # a defaultdict takes its factory first
    for key, value in values.items():
        clone[key] = value
    return clone


def leaves(tree: Any) -> Iterator[Any]:
    """Every leaf, depth first."""
    parts = _parts(tree)
    if parts is None:
        yield tree
    else:
        for _, part in parts:
            yield from leaves(part)


def named_leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with the code that leads to it, depth first; ``path`` is that of the tree itself."""
    parts = _parts(tree)
    if parts is None:
        yield path, tree
    else:
        for key, part in parts:
            step = f"[{key!r}]" if isinstance(tree, Mapping) or type(key) is int else f".{key}"
            yield from named_leaves(part, path + step)


def _parts(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds, by key, index or name; None for a leaf."""
    if isinstance(tree, Tensor) or _is_column(tree):
        return None
    if isinstance(tree, (tuple, list)):
        names = getattr(tree, "_fields", None)
        return enumerate(tree) if names is None else zip(names, tree, strict=True)
    if isinstance(tree, Mapping):
        return tree.items()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [field.name for field in dataclasses.fields(tree)]
        return [(name, getattr(tree, name)) for name in fields if hasattr(tree, name)]
    return None


def _has_rows(leaf: Any) -> bool:
    # Numpy arrays have rows too; recognised by what they can do, since numpy is not imported here.
    return (isinstance(leaf, Tensor) and leaf.dim() > 0) or (
        hasattr(leaf, "__array__") and len(getattr(leaf, "shape", ())) > 0
    )


def _is_column(leaf: Any) -> TypeGuard[list[Any] | tuple[str, ...]]:
    """A list that holds no tensors, or a tuple of strings. A tuple of numbers is more often a size, shared by all."""
    if type(leaf) is list:
        return bool(leaf) and all(map(_is_plain, leaf))
    return type(leaf) is tuple and bool(leaf) and all(isinstance(entry, (str, bytes)) for entry in leaf)


def _is_plain(value: Any) -> bool:
    """Whether there is no tensor in it that could have rows."""
    if isinstance(value, Tensor) or _has_rows(value):
        return False
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return not dataclasses.is_dataclass(value)
