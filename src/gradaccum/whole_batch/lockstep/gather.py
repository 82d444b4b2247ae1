"""A tensor over the whole batch, inside of a model's own code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gradaccum.errors import BatchError, UnsupportedError
from gradaccum.split.packing import restore_order
from gradaccum.types import Rows, num_rows
from gradaccum.whole_batch.interception import Handlers
from gradaccum.whole_batch.lockstep.conductor import Member
from gradaccum.whole_batch.outputs import CONCAT


def gather(x: Tensor) -> Tensor:
    """The rows of ``x`` of the whole batch, in the batch's order, with gradient.

    For layers that see other samples: statistics over the minibatch, attention between samples, a contrastive head.
    Where a training step runs its micro-batches in lockstep (``lockstep=True``, or ``batch_norm="exact"``), every
    micro-batch waits here for the others and gets the rows of all; what it goes on with has the gradient of the whole
    batch. Everywhere else (in evaluation, without accumulation, in a batch that is run in one piece) it returns ``x``.

    Args:
        x: ``[rows of the micro-batch, ...]``; every micro-batch has to come here, as often as the others.

    Returns:
        ``[rows of the batch, ...]``. To find the micro-batch's own rows in it, gather what tells them apart, too: an
        index that the batch brings, say.

    Raises:
        BatchError: the tensors of two micro-batches do not fit together.

    Example:
        >>> class MinibatchStd(nn.Module):
        ...     def forward(self, x):
        ...         spread = ga.gather(x).std(0).mean()
        ...         return torch.cat([x, spread.expand(len(x), 1)], dim=1)
        >>> MinibatchStd()(torch.zeros(3, 2)).shape
        torch.Size([3, 3])
    """
    if not isinstance(x, Tensor) or not x.dim():
        raise BatchError(
            f"ga.gather got {'a 0-d tensor' if isinstance(x, Tensor) else f'a {type(x).__name__}'}. It joins rows of "
            "the micro-batches: pass a tensor with one row for each sample, and gather several one by one."
        )
    found = _calls.answer(x)
    return x if found is None else found


_calls = Handlers()


class Gathers:
    """The gathered tensors of one batch, or of one process's share of it where ``is_all`` is False."""

    def __init__(self, pieces: Sequence[Rows], *, is_all: bool = True) -> None:
        self._pieces = pieces
        self._is_all = is_all
        self._are_slices = all(isinstance(piece, slice) for piece in pieces)
        self._gathered: list[tuple[Tensor, list[int], bool]] = []

    def in_forward(self, member: Member) -> AbstractContextManager[None]:
        """Context manager in which this thread's calls are those of this micro-batch."""
        return _calls.in_forward(functools.partial(self._first, member))

    def in_backward(self) -> AbstractContextManager[None]:
        """Context manager in which calls outside of a forward are those of checkpoints."""
        return _calls.in_backward(self._again)

    def _first(self, member: Member, x: Tensor) -> Tensor:
        return member.meet("gather", "ga.gather", (x, torch.is_grad_enabled()), self._join)

    def _again(self, x: Tensor) -> Tensor | None:
        """What the forward of a checkpoint got that brings ``x`` again; waits for the device."""
        for whole, rows, has_graph in self._gathered:
            seen = whole.detach()
            brought = seen.split(rows) if self._are_slices else [CONCAT.part(seen, piece) for piece in self._pieces]
            if any(one.shape == x.shape and torch.equal(one, x) for one in brought):
                if torch.is_grad_enabled() and not has_graph:
                    raise UnsupportedError(
                        "ga.gather ran without a graph and is run again in the backward: by a reentrant checkpoint. "
                        "The gradient through the other micro-batches would be missing. Use "
                        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                    )
                return whole
        if self._gathered:
            raise UnsupportedError(
                "ga.gather was called in the backward, by a checkpoint, with other values than in the forward. The "
                "gradient would belong to another batch. Does the checkpointed part depend on something that changes "
                "between two runs: a generator of its own, a counter, kernels that are not deterministic?"
            )
        return None

    def _join(self, brought: Sequence[tuple[Tensor, bool]]) -> Tensor:
        if not self._is_all:
            raise UnsupportedError(
                "ga.gather joins the micro-batches of one process, and this batch is spread over several: it would be "
                "a part of the batch. Train in one process, or move what couples samples into forward= and batch_loss=."
            )
        tensors, has_graph = [x for x, _ in brought], any(one for _, one in brought)
        shapes = sorted({tuple(x.shape[1:]) for x in tensors})
        if len(shapes) > 1:
            raise BatchError(
                f"ga.gather got rows of shape {shapes[0]} in one micro-batch and {shapes[-1]} in another, so they are "
                "not one tensor over the batch. Gather rows of one shape for every sample (pooled over its length), "
                "or pass ga.split_by_cost(..., trim=False)."
            )
        for piece, x in zip(self._pieces, tensors, strict=True):
            if not self._are_slices and len(x) != num_rows(piece):
                raise BatchError(
                    f"ga.gather got {len(x)} rows in a micro-batch of {num_rows(piece)} samples, whose order in the "
                    "batch is its split's. With one row for each sample they can be put back in the batch's order; "
                    "others cannot."
                )
        with torch.set_grad_enabled(has_graph):
            whole = torch.cat(tensors) if self._are_slices else restore_order(self._pieces, tensors)
        self._gathered.append((whole, [len(x) for x in tensors], has_graph))
        return whole
