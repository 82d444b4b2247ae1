"""What a mean may have been taken over: counts of a batch, as the code that a user would type for them.

The code is what is printed and what is evaluated, so that a line that was tried and the line that is shown cannot
differ. Which counts there are is decided on one batch (the whole look), and each is evaluated on all pieces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree

# Values that stand for "does not count": of torch, of detection anchors, of segmentation maps. Padding is often 0 or 1.
_IGNORED, _PADDING = (-100, -1, 255), (0, 1)
_MAX_LEAVES = 24
_MAX_ELEMENTS = 1 << 24  # of a leaf that is looked through; counting is otherwise not free


@dataclass(frozen=True, slots=True)
class BatchCount:
    """A count of a batch.

    Attributes:
        code: as it is typed, with ``batch`` for the batch.
        words: what it counts.
        is_likely: whether a mean over this is common. Others fit by chance more often than they are meant, and are
            worth showing only where none that is likely fits.
        weight: class weights, under the name ``weight`` in the code.
    """

    code: str
    words: str
    is_likely: bool = True
    weight: Tensor | None = None

    def of(self, batch: Any) -> float | None:
        """Returns the count of a batch; None where the code cannot be run on it, or gives no count."""
        names: dict[str, Any] = {"torch": torch, "batch": batch, "weight": self.weight}
        try:
            count = float(eval(self.code, names))  # made in this file, of paths that `_paths` let through
        except Exception:  # noqa: BLE001  # a candidate that a batch has no place for is none
            return None
        return count if 0 <= count < math.inf else None


def rows_code(batch: Any) -> str | None:
    """Returns code for the number of samples in a batch; None where nothing in it has rows."""
    return next((f"len({path})" for path, leaf in _paths(batch) if leaf.dim()), None)


def id_columns(batch: Any) -> list[tuple[str, Tensor]]:
    """Returns columns of whole numbers with their code: what may say which samples belong together."""
    return [
        (path, leaf.detach().cpu())
        for path, leaf in _paths(batch)
        if leaf.dim() == 1 and leaf.dtype in (torch.int64, torch.int32)
    ]


def counts_of(batch: Any, class_weights: Tensor | None = None, ignore_index: int | None = None) -> list[BatchCount]:
    """Returns all counts of a batch that a mean may be over, the likeliest first.

    Args:
        batch: the largest there is: values that are to be ignored are looked for in it.
        class_weights: as the graph of the loss holds them, if it does: a vector, one number for each class.
        ignore_index: likewise.
    """
    ignored = _IGNORED if ignore_index in (None, *_IGNORED) else (ignore_index, *_IGNORED)
    found: list[BatchCount] = []
    if (code := rows_code(batch)) is not None:
        found.append(BatchCount(code, "samples"))
    leaves = [(path, leaf) for path, leaf in _paths(batch) if 0 < leaf.numel() <= _MAX_ELEMENTS and leaf.dim()]
    for path, leaf in leaves:
        if class_weights is not None and _is_whole(leaf):
            found += _weighted(path, leaf, class_weights, ignored)
        if _is_mask(leaf):
            found += _mask(path, leaf)
        elif _is_whole(leaf):
            found += _labels(path, leaf, ignored)
        if not _is_mask(leaf) and not bool((leaf < 0).any()):
            found.append(BatchCount(f"{path}.sum()", f"the sum of {path}", is_likely=leaf.dim() == 1))
        found.append(BatchCount(f"{path}.numel()", f"the elements of {path}", is_likely=False))
    found += _both(leaves)
    return sorted({one.code: one for one in found}.values(), key=lambda one: not one.is_likely)


def _paths(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a batch by code that leads to them; not those under keys that no code can be written for."""
    for path, leaf in itertools.islice(tree.named_leaves(batch, "batch"), _MAX_LEAVES):
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            continue
        if BatchCount(f"{path}.numel()", "").of(batch) is not None:
            yield path, leaf


def _is_whole(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() and leaf.dtype != torch.bool


def _is_mask(leaf: Tensor) -> bool:
    return leaf.dtype == torch.bool or bool(((leaf == 0) | (leaf == 1)).all())


def _labels(path: str, leaf: Tensor, ignored: Sequence[int]) -> Iterator[BatchCount]:
    """Entries of whole numbers that do not stand for "ignored"; also without the first of each sample.

    A causal language model predicts the next token, and the first one is predicted from nothing: its own loss shifts
    the labels by one (transformers, ``ForCausalLMLoss``).
    """
    values = list(dict.fromkeys([*ignored, *_PADDING]))
    if leaf.dim() > 1:
        last = int(leaf[..., -1].flatten().mode().values)  # what rows are padded with
        values += [] if last in values else [last]
    for value in [one for one in values if _holds(leaf, one)]:
        for cut, where in _shifted(leaf):
            code, words = f"({path}{cut} != {value}).sum()", f"entries of {path}{where} that are not {value}"
            yield BatchCount(code, words, is_likely=value in ignored)
        if leaf.dim() > 1:
            words = f"samples with an entry of {path} that is not {value}"
            yield BatchCount(f"({path} != {value}).flatten(1).any(1).sum()", words, is_likely=False)
    for least in (0, 1):
        if len(leaf[leaf < least].unique()) > 1:  # two values below it, that one `!=` cannot name
            for cut, where in _shifted(leaf):
                yield BatchCount(f"({path}{cut} >= {least}).sum()", f"entries of {path}{where} from {least} on")


def _holds(leaf: Tensor, value: int) -> bool:
    return bool((leaf == value).any())


def _mask(path: str, leaf: Tensor) -> Iterator[BatchCount]:
    """Entries that a mask lets count; of one that says what is padding, the others."""
    for cut, where in _shifted(leaf):
        yield BatchCount(f"{path}{cut}.sum()", f"entries of {path}{where} that are set")
        others = f"(~{path}{cut}).sum()" if leaf.dtype == torch.bool else f"({path}{cut} == 0).sum()"
        yield BatchCount(others, f"entries of {path}{where} that are not set")
    if leaf.dim() > 1:
        words = f"samples with an entry of {path} that is set"
        yield BatchCount(f"{path}.flatten(1).any(1).sum()", words, is_likely=False)
        words = f"entries of {path}, without the last of each sample, that are set"
        yield BatchCount(f"{path}[..., :-1].sum()", words, is_likely=False)


def _shifted(leaf: Tensor) -> list[tuple[str, str]]:
    is_sequence = leaf.dim() > 1 and leaf.shape[1] > 1
    return [("", ""), *([("[:, 1:]", ", after the first of each sample,")] if is_sequence else [])]


def _both(leaves: list[tuple[str, Tensor]]) -> Iterator[BatchCount]:
    """Labels that a mask lets count and that are not ignored."""
    for (mask_path, mask), (path, leaf) in itertools.product(leaves, leaves):
        if not _is_mask(mask) or _is_mask(leaf) or not _is_whole(leaf) or mask.shape != leaf.shape:
            continue
        for value in [one for one in (*_IGNORED, 0) if _holds(leaf, one)]:
            for cut, where in _shifted(leaf):
                code = f"({mask_path}{cut} * ({path}{cut} != {value})).sum()"
                words = f"entries of {mask_path}{where} that are set where {path} is not {value}"
                yield BatchCount(code, words, is_likely=False)


def _weighted(path: str, leaf: Tensor, weight: Tensor, ignored: Sequence[int]) -> Iterator[BatchCount]:
    """Class weights of the labels, as `nn.CrossEntropyLoss` divides by them.

    Only where every label is a class: on a GPU an index out of range ends the process.
    """
    if weight.dim() != 1:
        return
    words = f"the class weights of {path}"
    if _are_classes(leaf, weight):
        yield BatchCount(f"weight[{path}].sum()", words, weight=weight)
    for value in [one for one in ignored if _holds(leaf, one)]:
        if _are_classes(leaf[leaf != value], weight):
            code = f"weight[{path}[{path} != {value}]].sum()"
            yield BatchCount(code, f"{words} that are not {value}", weight=weight)


def _are_classes(labels: Tensor, weight: Tensor) -> bool:
    return labels.numel() > 0 and int(labels.min()) >= 0 and int(labels.max()) < len(weight)
