"""What a mean may have been taken over: counts of a batch, as the code that a user would type for them.

The code is what is printed and what is evaluated, so that a line that was tried and the line that is shown cannot
differ. Which counts there are is decided on one batch (the whole look), and each is evaluated on all pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree

# Values that stand for "does not count" somewhere: of torch, of detection anchors, of padding, of segmentation maps.
_IGNORED = (-100, -1, 0, 1, 255)
_MAX_LEAVES = 24
_MAX_ELEMENTS = 1 << 24  # of a leaf that is looked through; counting is otherwise not free


@dataclass(frozen=True, slots=True)
class BatchCount:
    """A count of a batch: the code for it, with ``batch`` for the batch, and what it counts in words."""

    code: str
    words: str
    weight: Tensor | None = None  # class weights, under the name ``weight`` in the code

    def of(self, batch: Any) -> float | None:
        """Returns the count of a batch; None where the code cannot be run on it, or gives no count."""
        names: dict[str, Any] = {"torch": torch, "batch": batch, "weight": self.weight}
        try:
            count = float(eval(self.code, names))  # made here, of paths that `_paths` let through
        except Exception:  # noqa: BLE001  # a candidate that a batch has no place for is none
            return None
        return count if 0 <= count < float("inf") else None


def rows_code(batch: Any) -> str | None:
    """Returns code for the number of samples in a batch; None where nothing in it has rows."""
    return next((f"len({path})" for path, leaf in _paths(batch) if leaf.dim()), None)


def id_columns(batch: Any) -> list[tuple[str, Tensor]]:
    """Returns columns of whole numbers with their code, one number a row: what may say which samples belong together."""
    return [
        (path, leaf.detach().cpu())
        for path, leaf in _paths(batch)
        if leaf.dim() == 1 and leaf.dtype in (torch.int64, torch.int32)
    ]


def counts_of(batch: Any, class_weights: Tensor | None = None) -> list[BatchCount]:
    """Returns all counts of a batch that a mean may be over, the likeliest first.

    Args:
        batch: the largest there is: values that are to be ignored are looked for in it.
        class_weights: as the graph of the loss holds them, if it does: a vector, one number for each class.
    """
    leaves = [(path, leaf) for path, leaf in _paths(batch) if leaf.dim() and leaf.numel() <= _MAX_ELEMENTS]
    found: list[BatchCount] = []
    if (code := rows_code(batch)) is not None:
        found.append(BatchCount(code, "samples"))
    for path, leaf in leaves:
        if class_weights is not None:
            found += _weighted(path, leaf, class_weights)
    for path, leaf in leaves:
        found += _labels(path, leaf) if _is_whole(leaf) else []
    for path, leaf in leaves:
        found += _masks(path, leaf)
    found += _both(leaves)
    found += [BatchCount(f"{path}.numel()", f"the elements of {path}") for path, _ in leaves]
    return list({one.code: one for one in found}.values())


def _paths(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a batch by code that leads to them; not those under keys that no code can be written for."""
    for count, (path, leaf) in enumerate(tree.named_leaves(batch, "batch")):
        if count >= _MAX_LEAVES:
            return
        if (
            isinstance(leaf, Tensor)
            and not leaf.is_complex()
            and BatchCount(f"{path}.numel()", "").of(batch) is not None
        ):
            yield path, leaf


def _is_whole(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() and leaf.dtype != torch.bool


def _labels(path: str, leaf: Tensor) -> Iterator[BatchCount]:
    """Entries of whole numbers that do not stand for "ignored"; also without the first of each sample.

    A causal language model predicts the next token, and the first one is predicted from nothing: its own loss shifts
    the labels by one (transformers, ``ForCausalLMLoss``).
    """
    if leaf.numel() == 0:
        return
    ends = {int(leaf.min()), int(leaf.max())}
    if leaf.dim() > 1:
        ends.add(int(leaf[..., -1].flatten().mode().values))  # what rows are padded with
    for value in [one for one in (*_IGNORED, *sorted(ends - {*_IGNORED})) if bool((leaf == one).any())]:
        for cut, where in _shifted(leaf):
            yield BatchCount(f"({path}{cut} != {value}).sum()", f"entries of {path}{where} that are not {value}")
        if leaf.dim() > 1:
            words = f"samples with an entry of {path} that is not {value}"
            yield BatchCount(f"({path} != {value}).flatten(1).any(1).sum()", words)
    for least in (0, 1):
        if ends and min(ends) < least - 1:  # two values below it that `!=` cannot tell from each other
            for cut, where in _shifted(leaf):
                yield BatchCount(
                    f"({path}{cut} >= {least}).sum()", f"entries of {path}{where} that are at least {least}"
                )


def _masks(path: str, leaf: Tensor) -> Iterator[BatchCount]:
    """The sum of a mask, of lengths, of weights of samples; where a mask says what is padding, of what is not."""
    if leaf.numel() == 0 or bool((leaf < 0).any()):
        return
    is_mask = bool(((leaf == 0) | (leaf == 1)).all())
    for cut, where in _shifted(leaf) if is_mask else [("", "")]:
        yield BatchCount(f"{path}{cut}.sum()", f"the sum of {path}{where}")
    if is_mask and leaf.dtype == torch.bool:
        for cut, where in _shifted(leaf):
            yield BatchCount(f"(~{path}{cut}).sum()", f"entries of {path}{where} that are False")
    if is_mask and leaf.dim() > 1:
        yield BatchCount(f"{path}.flatten(1).any(1).sum()", f"samples with an entry in {path}")
        if leaf.shape[-1] > 1:
            yield BatchCount(f"{path}[..., :-1].sum()", f"the sum of {path} without the last of each sample")


def _shifted(leaf: Tensor) -> list[tuple[str, str]]:
    is_sequence = leaf.dim() > 1 and leaf.shape[1] > 1
    return [("", ""), *([("[:, 1:]", ", after the first of each sample,")] if is_sequence else [])]


def _both(leaves: list[tuple[str, Tensor]]) -> Iterator[BatchCount]:
    """Entries that are not ignored and that a mask lets count."""
    masks = [(path, leaf) for path, leaf in leaves if leaf.numel() and bool(((leaf == 0) | (leaf == 1)).all())]
    for mask_path, mask in masks:
        for path, leaf in leaves:
            if path == mask_path or mask.shape != leaf.shape or not _is_whole(leaf):
                continue
            for value in [one for one in _IGNORED if bool((leaf == one).any())]:
                for cut, where in _shifted(leaf):
                    code = f"({mask_path}{cut} * ({path}{cut} != {value})).sum()"
                    words = f"the sum of {mask_path}{where} where {path} is not {value}"
                    yield BatchCount(code, words)


def _weighted(path: str, leaf: Tensor, weight: Tensor) -> Iterator[BatchCount]:
    """Class weights of the labels, as `nn.CrossEntropyLoss` divides by them."""
    if not _is_whole(leaf) or leaf.numel() == 0 or weight.dim() != 1 or int(leaf.max()) >= len(weight):
        return
    words = f"the class weights of {path}"
    if int(leaf.min()) >= 0:
        yield BatchCount(f"weight[{path}].sum()", words, weight)
    for value in [one for one in _IGNORED if bool((leaf == one).any())]:
        yield BatchCount(f"weight[{path}[{path} != {value}]].sum()", f"{words} that are not {value}", weight)
