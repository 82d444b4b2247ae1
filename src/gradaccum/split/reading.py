"""What a split knows of batches: how they are read, with what the user has said of them, and which samples go together.

A batch is read once, when it is planned, and pieces of it are cut as it was read then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError, WindowError
from gradaccum.types import Rows

logger = logging.getLogger("gradaccum")

Groups = Callable[[Any], Tensor]
"""From a batch to one number for each sample; those with the same number stay in one micro-batch."""


@dataclass(slots=True, kw_only=True)
class Reading:
    """Reads batches with ``axes`` and ``groups``, see `split_by_samples`.

    Raises:
        WindowError: they are none.
    """

    axes: tree.Axes | None = None
    groups: Groups | None = None
    _layout: tree.Layout | None = field(default=None, compare=False, repr=False)  # of the batch seen last
    _planned: tree.Layout | None = field(default=None, compare=False, repr=False)  # of the batch planned last
    _before: tree.Layout | None = field(default=None, compare=False, repr=False)  # of the other batch before that

    def __post_init__(self) -> None:
        if self.groups is not None and not callable(self.groups):
            raise WindowError(
                f"groups is a {type(self.groups).__name__}, and is called with every batch. Pass a function of the "
                'batch that returns the number of each sample\'s group, such as lambda batch: batch["prompt_id"].'
            )
        if self.axes is not None and not isinstance(self.axes, Mapping):
            raise WindowError(
                f"axes is a {type(self.axes).__name__}: it says by entry which dimension has the samples. Pass a dict "
                'such as {"position_ids": 1, "class_weights": None}.'
            )
        for name, axis in (self.axes or {}).items():
            if not (axis is None or callable(axis) or (isinstance(axis, int) and not isinstance(axis, bool))):
                raise WindowError(
                    f"axes={{{name!r}: {axis!r}}}: it is the dimension that has the samples (an int), None for what "
                    "all samples share, or counts(batch), which returns how many rows belong to each sample."
                )

    def layout(self, batch: Any) -> tree.Layout:
        """How a batch is read: as it was when it was planned, if it was."""
        if self._layout is None or not self._layout.is_of(batch):
            self._layout = tree.read(batch, self.axes, self._planned)
        return self._layout

    def planned(self, batch: Any) -> tree.Layout:
        """How a batch is read that is to be cut; anew, since the same tensors may have been filled again."""
        if self._planned is None or not self._planned.is_of(batch):
            self._before = self._planned
        self._layout = tree.read(batch, self.axes, self._before, is_next=True)
        if self._planned is None:
            logger.debug("a batch of %s", self._layout)
        self._planned = self._layout
        return self._layout

    def rows(self, batch: Any) -> int:
        """The number of samples."""
        return tree.rows_of(batch, self.layout(batch))

    def rows_to_plan(self, batch: Any) -> int:
        """The number of samples of a batch that is to be cut, which is at least one.

        Raises:
            BatchError: there are none; or it is a packed batch, which is not cut at samples.
        """
        _refuse_packed(batch, self.axes or {})
        rows = tree.rows_of(batch, self.planned(batch))
        if rows == 0:
            raise BatchError(
                "The batch has 0 rows. A mean over no samples is 0 / 0, so there is no gradient to make an update "
                "from. Leave empty batches out."
            )
        return rows

    def take(self, batch: Any, rows: Rows) -> Any:
        """The given samples."""
        return tree.take(batch, rows, self.layout(batch))

    def members(self, batch: Any, rows: int) -> list[list[int]] | None:
        """The samples of each group, in the order of their first ones; None where samples are free."""
        if self.groups is None:
            return None
        numbers = self.groups(batch)
        if not isinstance(numbers, Tensor) or numbers.shape != (rows,) or numbers.is_floating_point():
            kind = f"tensor of shape {tuple(numbers.shape)} and {numbers.dtype}" if isinstance(numbers, Tensor) else ""
            raise BatchError(
                f"groups(batch) returned a {kind or type(numbers).__name__} for a batch of {rows} samples. Return a "
                "LongTensor with one number for each sample: those with the same number stay in one micro-batch."
            )
        found: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            found.setdefault(number, []).append(row)
        return list(found.values())


def as_rows(members: Sequence[int]) -> Rows:
    """Numbers of samples as a slice, whose tensors are views, where they follow each other."""
    start, stop = members[0], members[-1] + 1
    return slice(start, stop) if list(members) == list(range(start, stop)) else torch.tensor(members)


def next_fit(groups: Sequence[Sequence[int]], fits: Callable[[int, Sequence[int]], bool]) -> list[list[int]]:
    """Puts groups into pieces one after another; ``fits`` says whether a piece of so many samples can take one more.

    A group that fits nowhere is a piece of its own.
    """
    pieces: list[list[int]] = []
    for group in groups:
        if pieces and fits(len(pieces[-1]), group):
            pieces[-1].extend(group)
        else:
            pieces.append(list(group))
    return [sorted(piece) for piece in pieces]


def _refuse_packed(batch: Any, axes: tree.Axes) -> None:
    """Refuses sequences that lie one after another in one dimension: samples are not the rows."""
    if not isinstance(batch, Mapping):
        return
    lengths = next((key for key in batch if is_cumulative(key) and key not in axes and batch[key] is not None), None)
    if lengths is not None:
        raise BatchError(
            f"The batch is packed: batch[{lengths!r}] has the cumulative lengths of sequences that lie one after "
            "another. Cut at rows, they would be those of other sequences. Pass split=ga.split_packed(), which cuts "
            f"between sequences; or, if all samples share them, ga.split_by_samples(axes={{{lengths!r}: None}})."
        )
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor):
        return
    if positions.dim() != 1 or "position_ids" in axes:
        return
    anew = int((positions[1:] != positions[:-1] + 1).sum())
    if anew:
        raise BatchError(
            f"The batch is packed: position_ids of shape {tuple(positions.shape)} start anew {anew} times, so "
            "dimension 0 holds sequences one after another. Cut at its rows, sequences would be torn apart and lose "
            "what they attend to. Pass split=ga.split_packed(), which cuts between them."
        )


def is_cumulative(key: Any) -> bool:
    """Whether an entry of this name holds the cumulative lengths of packed sequences."""
    return isinstance(key, str) and key.startswith(("cu_seq", "cu_len", "cumulative_seq"))
