"""A packed batch, cut between its sequences, which lie one after another in one dimension.

Where they begin is read from cumulative lengths (``cu_seq_lens``, ``cu_seqlens_q``, ...), or else from
``position_ids``, which start anew; a packed batch of Hugging Face's ``DataCollatorWithFlattening`` has the latter. The
dimension that is as long as all sequences together is cut in every tensor; cumulative lengths and the longest length
are those of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BatchError, WindowError
from gradaccum.split.by_samples import equal_pieces
from gradaccum.split.reading import is_cumulative
from gradaccum.types import Rows, Split

_POSITIONS = "position_ids"


def split_packed() -> Split:
    """Cuts a packed batch, a dict, between its sequences; these are its samples, and never cut.

    A plain loss, a mean over tokens, is not one over sequences: return a `Loss` that knows the number of tokens.

    Example:
        >>> split = ga.split_packed()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        >>> split.rows(batch)
        2
        >>> split.cut(batch, slice(1, 2))["input_ids"]
        tensor([[5, 6]])
    """
    return _Packed()


@dataclass(frozen=True, slots=True)
class _Packed:
    unit = "sequences"

    def rows(self, batch: Any) -> int:
        return len(_starts(batch)) - 1

    def largest(self, batch: Any) -> int:
        return self.rows(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        size = size if max_rows is None else min(size, max_rows)
        if size < 1:
            raise WindowError(f"micro_batch_size={size}: a micro-batch has at least one sequence. Pass 1 or more.")
        rows = self.rows(batch)
        if not rows:
            raise BatchError("The packed batch has 0 sequences, so there is no gradient. Leave empty batches out.")
        return equal_pieces(range(rows + 1), size)

    def cut(self, batch: Any, rows: Rows) -> Any:
        starts = _starts(batch)
        if isinstance(rows, slice):
            if rows.start == 0 and rows.stop == len(starts) - 1:
                return batch
            rows = torch.arange(rows.start, rows.stop)
        chosen = rows.tolist()
        which = torch.cat([torch.arange(*starts[i : i + 2]) for i in chosen])
        lengths = [starts[i + 1] - starts[i] for i in chosen]
        cut = {key: _cut(key, value, which, rows, lengths, starts) for key, value in batch.items()}
        return cut if type(batch) is dict else type(batch)(cut)


def _cut(key: Any, value: Any, which: Tensor, rows: Tensor, lengths: list[int], starts: list[int]) -> Any:
    tokens, sequences = starts[-1], len(starts) - 1
    if is_cumulative(key):
        fresh = torch.tensor([0, *lengths]).cumsum(0)
        return fresh.to(value) if isinstance(value, Tensor) else fresh.tolist()
    if isinstance(key, str) and key.startswith("max_") and ("len" in key):
        longest = max(lengths)
        return value.new_full((), longest).reshape(value.shape) if isinstance(value, Tensor) else longest
    if isinstance(value, Tensor) and value.dim():
        along = [dim for dim, size in enumerate(value.shape) if size == tokens]
        if along:
            # A mask of tokens by tokens is cut along both; features that happen to be as many are not.
            is_square = len(along) > 1 and "mask" in str(key)
            for dim in along if is_square else along[:1]:
                value = value.index_select(dim, which.to(value.device))
            return value
        if value.shape[0] == sequences:
            return value.index_select(0, rows.to(value.device))
        raise BatchError(
            f"batch[{key!r}] has shape {tuple(value.shape)}, of which no dimension has the {tokens} tokens of the "
            f"packed batch, nor the first its {sequences} sequences. Left as it is, a micro-batch's sequences would "
            "meet the others' values. Leave it out of the batch, or cut it in a ga.Split of your own."
        )
    if isinstance(value, (list, tuple)) and len(value) in (sequences, tokens):
        return type(value)(value[i] for i in (rows if len(value) == sequences else which).tolist())
    return value


def _starts(batch: Any) -> list[int]:
    """Where each sequence begins, and where the last one ends. This synchronises with the device."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"ga.split_packed() finds sequences by position_ids or cu_seq_lens, and the batch is a "
            f"{type(batch).__name__}. Pass a dict that has one of them, or a ga.Split of your own."
        )
    for key, value in batch.items():
        if is_cumulative(key) and value is not None:
            return [int(start) for start in (value.flatten().tolist() if isinstance(value, Tensor) else value)]
    positions = batch.get(_POSITIONS)
    if not isinstance(positions, Tensor):
        raise BatchError(
            f"The batch has neither position_ids nor cu_seq_lens ({', '.join(map(repr, batch))}), so where its "
            "sequences begin is not known. Have the collator return them: "
            "DataCollatorWithFlattening(return_position_ids=True)."
        )
    if positions.numel() != max(positions.shape):
        raise BatchError(
            f"position_ids has shape {tuple(positions.shape)}: several rows, which are samples already. Leave split= "
            "out, or pass cu_seq_lens for sequences packed into one row."
        )
    flat = positions.flatten()
    anew = (flat[1:] != flat[:-1] + 1).nonzero().flatten() + 1
    return [0, *anew.tolist(), len(flat)] if len(flat) else [0]
