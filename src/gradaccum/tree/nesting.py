"""How batches nest: tensors in tuples, named tuples, lists, dicts, dataclasses and other mappings, at any depth.

The only file that takes containers apart and puts them together again (Hugging Face's ``BatchEncoding`` is one of the
other mappings). Which of the parts have samples, and along what, is read in `layout`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor


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
    """The same structure with ``function`` applied to every leaf; a list or tuple without tensors is one leaf."""
    parts = parts_of(tree)
    return function(tree) if parts is None else with_parts(tree, [map_leaves(part, function) for _, part in parts])


def with_parts(tree: Any, values: Sequence[Any]) -> Any:
    """A container like this one that holds these values, in the order of `parts_of`."""
    if isinstance(tree, (tuple, list)):
        if hasattr(tree, "_fields"):
            return type(tree)(*values)  # a named tuple
        return list(values) if type(tree) is list else type(tree)(values)
    if isinstance(tree, Mapping):
        return _rebuilt_mapping(tree, dict(zip(tree, values, strict=True)))
    # Copied and filled, not constructed: __post_init__ may check or compute what holds for whole batches only.
    clone = copy.copy(tree)
    for (name, _), value in zip(parts_of(tree) or (), values, strict=True):
        object.__setattr__(clone, name, value)
    return clone


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
    parts = parts_of(tree)
    if parts is None:
        yield tree
    else:
        for _, part in parts:
            yield from leaves(part)


def named_leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with the code that leads to it, depth first; ``path`` is that of the tree itself."""
    parts = parts_of(tree)
    if parts is None:
        yield path, tree
    else:
        for key, part in parts:
            yield from named_leaves(part, path + code_of(tree, key))


def code_of(tree: Any, key: Any) -> str:
    """The code that leads from a container to the part under this key."""
    return f"[{key!r}]" if isinstance(tree, Mapping) or type(key) is int else f".{key}"


def parts_of(tree: Any) -> Iterable[tuple[Any, Any]] | None:
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


def has_rows(leaf: Any) -> bool:
    """Whether it is a tensor or an array with a first dimension."""
    # Numpy arrays have rows too; recognised by what they can do, since numpy is not imported here.
    return (isinstance(leaf, Tensor) and leaf.dim() > 0) or (
        hasattr(leaf, "__array__") and len(getattr(leaf, "shape", ())) > 0
    )


def _is_column(leaf: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """A list that holds no tensors, or a tuple of numbers, strings and the like."""
    if type(leaf) is tuple:  # one of lists is a batch of columns
        return bool(leaf) and not any(isinstance(entry, (list, tuple, Mapping)) for entry in leaf) and is_plain(leaf)
    return type(leaf) is list and bool(leaf) and is_plain(leaf)


def is_plain(value: Any) -> bool:
    """Whether there is no tensor in it that could have rows."""
    if isinstance(value, Tensor) or has_rows(value):
        return False
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return not dataclasses.is_dataclass(value)
