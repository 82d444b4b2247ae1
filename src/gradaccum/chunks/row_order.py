"""Which rows make the next chunk: those that may count first, and none that are known to add nothing.

A criterion of torch says with its loss which labels it ignores (`Loss.ignored`). Where the loss of a chunk is that of
such a criterion, and nothing was added to it, rows with an ignored label need not be run: they have no loss, no weight
and no gradient. Until the first chunk has run, nothing is known; so rows with a negative label, which is no class, wait
until the others have been run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gradaccum.losses.loss import Loss

Ignored = tuple[int, int]
"""Which of the targets is a label, and the label whose rows add nothing."""


def ignored_by(losses: Iterable[Loss], target_rows: Sequence[Tensor]) -> Ignored | None:
    """Which rows of a chunk added nothing to any of its losses; None where that is not known."""
    found: set[Ignored | None] = set()
    for loss in losses:
        labels, label = loss.ignored or (None, 0)
        position = None if labels is None else _position_of(labels, target_rows)
        found.add(None if position is None else (position, label))
    return found.pop() if len(found) == 1 else None


def _position_of(labels: Tensor, target_rows: Sequence[Tensor]) -> int | None:
    """Which of the targets a loss got as its labels: the same memory, perhaps seen with another shape."""
    for position, target in enumerate(target_rows):
        if isinstance(target, FakeTensor) or not _is_label(target) or isinstance(labels, FakeTensor):
            continue
        is_same = labels.data_ptr() == target.data_ptr() and labels.numel() == target.numel() > 0
        if is_same and labels.dtype == target.dtype:
            return position
    return None


def _is_label(target: Tensor) -> bool:
    """Whether a target has one whole number for each row."""
    return target.dim() == 1 and not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


class RowOrder:
    """Hands out the rows of one chunk after another.

    Args:
        targets: what belongs to the rows, flattened to [rows, ...].
        num_rows: how many there are.
        size: rows in a chunk.
        ignored: which rows add nothing, where that is known before.
    """

    def __init__(self, targets: Sequence[Tensor], num_rows: int, size: int, ignored: Ignored | None) -> None:
        self._targets, self._size = targets, size
        self._order: Tensor | None = None  # None for the rows as they come
        self._at, self._end = 0, num_rows
        self._later: Tensor | None = None  # rows that are likely to add nothing
        self._has_run = False
        self._is_known = any(isinstance(target, FakeTensor) for target in targets)  # these have no values to look at
        if self._is_known:
            return
        if ignored is not None:
            position, label = ignored
            self._is_known = True
            self._leave_only(targets[position].long() != label)
        elif (labels := next((target for target in targets if _is_label(target)), None)) is not None:
            is_negative = labels < 0
            later = is_negative.nonzero().squeeze(1)
            if 0 < len(later) < num_rows:
                self._later = later
                self._leave_only(~is_negative)

    def next(self) -> slice | Tensor | None:
        """The rows of the next chunk; an empty one where there are none at all; None after the last."""
        if self._at >= self._end and self._later is not None and len(self._later):
            self._order, self._at, self._end, self._later = self._later, 0, len(self._later), None
        if self._at >= self._end and self._has_run:
            return None
        self._has_run = True
        rows = slice(self._at, min(self._at + self._size, self._end))
        self._at = rows.stop
        return rows if self._order is None else self._order[rows]

    def learn(self, ignored: Ignored | None) -> None:
        """Leaves out what is still to come and adds nothing, as a chunk's loss has said."""
        if self._is_known or ignored is None:
            return
        self._is_known = True
        position, label = ignored
        labels = self._targets[position].long()
        if self._later is not None:
            self._later = self._later[labels[self._later] != label]
        if label >= 0 or self._later is None:
            if self._order is None:
                self._order = torch.arange(self._end, device=labels.device)
            left = self._order[self._at : self._end]
            self._order = left[labels[left] != label]
            self._at, self._end = 0, len(self._order)

    def _leave_only(self, counts: Tensor) -> None:
        rows = counts.nonzero().squeeze(1)
        if len(rows) < self._end:
            self._order, self._end = rows, len(rows)
