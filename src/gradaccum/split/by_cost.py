"""A batch into micro-batches of samples that cost alike, each trimmed to what its samples need."""

from __future__ import annotations

import logging
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError, WindowError
from gradaccum.split.packing import pack
from gradaccum.split.padding import Padding, find_padding, trimmed
from gradaccum.split.reading import Groups, Reading, next_fit
from gradaccum.types import Rows, Split

logger = logging.getLogger(__name__)

# By default a piece counts as much as this part of the budget, in time, besides what it runs. A micro-batch is made so
# large that a device is busy in it: at 95% of its throughput its fixed time is 1/20 of it. Measured on one CPU thread
# with micro-batches of 64 to 1,024 tokens: as much as 27 tokens (transformer of 23 M parameters), 184 (0.1 M), or 1,250
# (a GRU, which is all steps). It need not be met: for lengths exp(4 + 0.8 z), 256 samples and a budget of 2,048, a plan
# made for 1/20 takes at most 5% more time than the best one where the fixed time is 1/128 to 1/5 of the budget.
PIECES_PER_BUDGET = 20


def split_by_cost(
    cost: Callable[[Any], Tensor],
    max_cost: int,
    axes: tree.Axes | None = None,
    groups: Groups | None = None,
    *,
    piece_cost: float | None = None,
    trim: bool = True,
) -> Split:
    """Packs samples of like cost into micro-batches, and trims the padding that all samples of one share.

    A batch padded to its longest sample mostly runs padding: 7.5 tokens for each real one at log-normal lengths. Cut
    into pieces of like length, each padded to its own longest, it has the same gradient for 1.07. Over all ways to
    divide the batch, the pieces are those with the least

        sum over pieces of  rows * costliest + piece_cost     where  rows * costliest <= max_cost

    The one with most to run comes first, so that one which does not fit fails before others have run.

    Columns that are padding in every sample of a piece are trimmed in every field and every dimension of that width,
    on either side. Which columns are padding is read from the batch, and believed where the costs agree: they count the
    real columns, but for a constant, or two such counts (source and target), or rank the samples as a mask does
    (squares, seconds). A mask under the key ``"attention_mask"`` needs no such proof. What is not certainly padded
    stays; if that is all, the logger says once why. Where padding is an end-of-text token, and neither mask nor labels
    tell the two apart, the costs must count it: real columns that look like padding are kept only if they do.

    The gradient is exact under two conditions, which are not checked. The model's outputs at real columns do not depend
    on how many padded ones there are: attention is masked, recurrence is causal or packed; positions on the left-padded
    side come from the batch or the mask; no convolution, pooling or normalisation runs over padding. And the loss is a
    mean over tokens, a `Loss` that knows their number: a mean over all columns changes with the padding.

    Args:
        cost: ``cost(batch)`` is called with the whole batch and returns ``[rows]``, what each sample costs, not
            negative: its number of tokens, say.
        max_cost: the largest number of rows times the costliest of one micro-batch. A sample that costs more is run
            alone.
        axes: see `split_by_samples`.
        groups: see `split_by_samples`. A group that costs more than ``max_cost`` is run alone.
        piece_cost: what a micro-batch takes besides, in the unit of ``cost``: its fixed time over the time of one
            token. More makes fewer pieces with more padding. By default a twentieth of ``max_cost``.
        trim: False leaves all columns, for models that do look at padding.

    Raises:
        WindowError: ``cost`` is not callable, ``max_cost`` or ``piece_cost`` is not a number that makes pieces.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0], [5, 6, 7, 0]])}
        >>> split = ga.split_by_cost(lambda batch: (batch["input_ids"] != 0).sum(1), 8, piece_cost=2)
        >>> pieces = split.plan(batch, split.largest(batch))
        >>> [split.cut(batch, rows)["input_ids"].tolist() for rows in pieces]
        [[[5, 6, 7, 8], [5, 6, 7, 0]], [[5, 6], [9, 0]]]
    """
    if not callable(cost):
        raise WindowError(
            f"cost is a {type(cost).__name__}, and is called with every batch. Pass a function of the batch that "
            "returns one number for each row, such as lambda batch: batch['attention_mask'].sum(1)."
        )
    if isinstance(max_cost, bool) or not isinstance(max_cost, int) or max_cost < 1:
        raise WindowError(
            f"max_cost={max_cost!r}: it is the largest rows times costliest of a micro-batch, an int of at least 1, in "
            "the unit of cost. Pass the largest that fits in memory; the gradient does not depend on it."
        )
    if piece_cost is not None and not (isinstance(piece_cost, (int, float)) and 0 <= piece_cost < math.inf):
        raise WindowError(
            f"piece_cost={piece_cost!r}: it is the fixed time of a micro-batch in the unit of cost, a finite number "
            "that is not negative. Leave it out for a twentieth of max_cost."
        )
    return _ByCost(cost, max_cost, piece_cost, trim, Reading(axes=axes, groups=groups))


@dataclass
class _ByCost:
    cost: Callable[[Any], Tensor]
    max_cost: int
    piece_cost: float | None
    trim: bool
    reading: Reading
    # Every piece needs the batch's padding, and reading it takes a pass over the whole batch: so it is kept, with the
    # tensors that it was read from.
    _padding: Padding | None = None
    _read_from: list[weakref.ref[Tensor]] = field(default_factory=list)
    _has_logged: bool = False
    unit = "cost"

    def rows(self, batch: Any) -> int:
        return self.reading.rows(batch)

    def largest(self, batch: Any) -> int:
        return self._largest(self._costs(batch))

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        if size < 1 or (max_rows is not None and max_rows < 1):
            raise WindowError(
                f"size={size}, max_rows={max_rows}: a micro-batch has at least one sample and a cost of at least 1. "
                "Pass the largest that fits in memory."
            )
        costs = self._costs(batch)
        self._padding = None  # the same tensors may have been filled anew
        piece_cost = self._largest(costs) / PIECES_PER_BUDGET if self.piece_cost is None else self.piece_cost
        max_rows = len(costs) if max_rows is None else max_rows
        groups = self.reading.members(batch, len(costs))
        if groups is not None:
            pieces = _pack_groups(groups, costs, size=size, piece_cost=piece_cost, max_rows=max_rows)
        else:
            pieces = pack(costs, size=size, piece_cost=piece_cost, max_rows=max_rows)
        return [torch.tensor(piece) for piece in pieces]

    def cut(self, batch: Any, rows: Rows) -> Any:
        if not self.trim:
            return self.reading.take(batch, rows)
        return trimmed(batch, rows, self._padding_of(batch), self.reading.layout(batch))

    def _largest(self, costs: Sequence[float]) -> int:
        return max(1, min(self.max_cost, math.ceil(len(costs) * max(costs))))

    def _padding_of(self, batch: Any) -> Padding:
        tensors = list(tree.tensors(batch))
        known = [reference() for reference in self._read_from]
        is_known = 0 < len(tensors) == len(known) and all(map(operator.is_, tensors, known))
        if self._padding is None or not is_known:
            costs = self._costs(batch)
            self._padding = find_padding(batch, costs, self.reading.layout(batch))
            self._read_from = [weakref.ref(tensor) for tensor in tensors]
            if not self._padding.real and len(set(costs)) > 1 and not self._has_logged:
                self._has_logged = True
                logger.info(
                    "split_by_cost: samples of like cost are packed together, but no padding is trimmed: %s. Costs "
                    "that are the number of each sample's real columns would tell.",
                    self._padding.doubt or "the batch shows none",
                )
        return self._padding

    def _costs(self, batch: Any) -> list[float]:
        """What each row costs; this synchronises with the device of the costs."""
        rows = self.reading.rows_to_plan(batch)
        costs = self.cost(batch)
        is_tensor = isinstance(costs, Tensor)
        if not is_tensor or costs.shape != (rows,) or costs.is_complex():
            kind = f"tensor of shape {tuple(costs.shape)} and {costs.dtype}" if is_tensor else type(costs).__name__
            raise BatchError(
                f"cost(batch) returned a {kind} for a batch of {rows} rows. Return a 1-d tensor with one real number "
                "for each row, such as batch['attention_mask'].sum(1)."
            )
        numbers: list[float] = costs.detach().tolist()
        wrong = next((row for row, number in enumerate(numbers) if not 0 <= number < math.inf), None)
        if wrong is not None:
            raise BatchError(
                f"cost(batch) is {numbers[wrong]} for row {wrong}, and samples cannot be packed by that. Return finite "
                "numbers that are not negative."
            )
        return numbers


def _pack_groups(
    groups: Sequence[Sequence[int]], costs: Sequence[float], *, size: int, piece_cost: float, max_rows: int
) -> list[list[int]]:
    """Packs groups of samples of like cost; of groups that are all as large, in the best way."""
    costliest = [max(costs[row] for row in group) for group in groups]
    large = len(groups[0])
    if all(len(group) == large for group in groups):
        # n of them cost n * large * costliest: as n samples that cost so much each.
        packed = pack([large * cost for cost in costliest], size=size, piece_cost=piece_cost,
                      max_rows=max(1, max_rows // large))  # fmt: skip
        return [sorted(row for i in piece for row in groups[i]) for piece in packed]
    order = sorted(range(len(groups)), key=costliest.__getitem__, reverse=True)
    first: list[float] = []  # what the costliest sample of each piece costs

    def fits(held: int, group: Sequence[int]) -> bool:
        is_room = held + len(group) <= max_rows and (held + len(group)) * first[-1] <= size
        if not is_room:
            first.append(max(costs[row] for row in group))
        return is_room

    first.append(costliest[order[0]])
    return next_fit([groups[i] for i in order], fits)
