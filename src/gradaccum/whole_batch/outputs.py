"""A model's outputs, micro-batch by micro-batch, as the whole batch's.

    CONCAT   index 0 is the sample: rows go to where their samples are in the batch, in whatever order they ran
    SUM      statistics that add up over samples: only their sum is kept

Outputs are any nesting of tensors. The whole is made without a graph; its tensors are leaves, so that the loss's
gradient on the outputs can be read off them and pushed back into each micro-batch's own graph. How a piece is put in
and which part of the gradient it gets are functions, in the way of optax's microbatching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError
from gradaccum.split.packing import restore_order
from gradaccum.types import HALF_DTYPES, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How the outputs of pieces become the outputs of the batch, one tensor at a time.

    Attributes:
        start: ``(tensor, rows)``: the batch's tensor, zero, from a piece's and how many rows the batch has.
        put: ``(whole, tensor, rows, samples, place)`` puts the tensor of a piece, which is output ``place``, into it.
        part: ``(whole, rows)``: what of the batch's tensor, or of its gradient, belongs to the piece of these rows.
        join: ``(pieces, tensors)``: the batch's tensor from those of all pieces, with their graph.
        keeps_parts: whether pieces' tensors are kept besides, because the batch's does not show them any more.
    """

    start: Callable[[Tensor, int], Tensor]
    put: Callable[[Tensor, Tensor, Rows, int, int], None]
    part: Callable[[Tensor, Rows], Tensor]
    join: Callable[[Sequence[Rows], Sequence[Tensor]], Tensor]
    keeps_parts: bool


def _put_concat(whole: Tensor, tensor: Tensor, rows: Rows, samples: int, place: int) -> None:
    if not tensor.dim() or len(tensor) != samples:
        raise BatchError(
            f"forward returned a tensor of shape {tuple(tensor.shape)} (output {place}) for a micro-batch of {samples} "
            f"samples. The loss is to see the whole batch's outputs in the batch's order, so each must have one row "
            f"for each sample, index 0. Two views of a sample: torch.stack([first, second], dim=1), not torch.cat. "
            'Statistics that add up over samples: combine="sum".'
        )
    if tensor.shape[1:] != whole.shape[1:] or tensor.dtype != whole.dtype:
        raise BatchError(
            f"Output {place} has rows of shape {tuple(tensor.shape[1:])} ({tensor.dtype}) in one micro-batch and "
            f"{tuple(whole.shape[1:])} ({whole.dtype}) in another, so they are not one tensor over the batch. "
            "Return outputs of one shape for every sample: pooled over its length, say, where micro-batches "
            "are trimmed to lengths of their own, or pass ga.split_by_cost(..., trim=False)."
        )
    whole[rows] = tensor


def _put_sum(whole: Tensor, tensor: Tensor, rows: Rows, samples: int, place: int) -> None:
    if tensor.shape != whole.shape:
        raise BatchError(
            f"Statistic {place} has shape {tuple(tensor.shape)} in one micro-batch and {tuple(whole.shape)} in "
            'another, so they cannot be added up. With combine="sum" forward returns sums over the '
            "micro-batch's samples, whose shape does not depend on how many there are; for outputs with one "
            'row for each sample leave combine="concat".'
        )
    whole += tensor


def _wide(tensor: Tensor) -> Tensor:
    # Half-precision statistics are added up in fp32: at 1,000 micro-batches a bf16 sum would have stopped growing.
    return tensor.float() if tensor.dtype in HALF_DTYPES else tensor


def summable(output_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``output_of`` for statistics: numbers are 0-d tensors, which add up like the others.

    Raises:
        BatchError: something else than tensors and numbers is among them.
    """

    def outputs_of(micro_batch: Any) -> Any:
        outputs = output_of(micro_batch)
        tensors = list(tree.tensors(outputs))
        if not tensors:
            return outputs  # refused in a moment
        wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)

        def statistic(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) or leaf is None:
                return leaf
            if type(leaf) not in (int, float):
                raise BatchError(
                    f'forward returned a {type(leaf).__name__} among its statistics: {leaf!r:.40}. With combine="sum" '
                    "micro-batches are added up, and the loss would see the first one's alone. Return tensors and "
                    "numbers: torch.tensor(values) for several; what no sum can be made of is had from the batch, in "
                    "batch_loss(outputs, batch)."
                )
            dtype = torch.int64 if type(leaf) is int else torch.float64 if wide else torch.float32
            return torch.tensor(leaf, dtype=dtype, device=tensors[0].device)

        return tree.map_leaves(outputs, statistic)

    return outputs_of


def _plain_values(outputs: Any) -> list[Any]:
    """The numbers and words among outputs, and columns of them."""
    return [leaf for leaf in tree.leaves(outputs) if isinstance(leaf, (int, float, str, list, tuple))]


CONCAT = Combination(
    start=lambda tensor, rows: tensor.new_zeros((rows, *tensor.shape[1:])),
    put=_put_concat,
    part=lambda whole, rows: whole[rows],
    join=restore_order,
    keeps_parts=False,
)
SUM = Combination(
    start=lambda tensor, rows: torch.zeros_like(_wide(tensor)),
    put=_put_sum,
    part=lambda whole, rows: whole,  # the derivative of a sum is the same for every summand
    join=lambda pieces, tensors: torch.stack([_wide(tensor) for tensor in tensors]).sum(0),
    keeps_parts=True,
)


class Outputs:
    """The outputs of a batch of so many rows while its micro-batches come in; no tensors before the first has."""

    def __init__(self, combination: Combination, rows: int) -> None:
        self.combination = combination
        self.rows = rows
        self.tensors: list[Tensor] = []
        self._structure: Any = None
        self._plain: list[Any] = []
        self._dtypes: list[torch.dtype] = []
        self._parts: list[list[Tensor]] = []

    def put(self, rows: Rows, samples: int, outputs: Any) -> None:
        """Takes a micro-batch's outputs in; no graph is kept.

        Raises:
            BatchError: they do not fit together with the others'.
        """
        found = [tensor.detach() for tensor in tree.tensors(outputs)]
        if not found and not self.tensors:
            raise BatchError(
                "forward returned no tensor, so there is nothing that batch_loss could have a gradient of. Return the "
                "model's outputs: a tensor or any nesting of them."
            )
        if not self.tensors:
            self._structure = rebuilt(outputs, [tensor.new_empty(0) for tensor in found])
            self._plain = _plain_values(outputs)
            self._dtypes = [tensor.dtype for tensor in found]
            self.tensors = [self.combination.start(tensor, self.rows) for tensor in found]
        if len(found) != len(self.tensors):
            raise BatchError(
                f"forward returned {len(found)} tensors for one micro-batch and {len(self.tensors)} for another, so "
                "they are not the outputs of one batch. Return the same structure for every micro-batch."
            )
        plain = _plain_values(outputs)
        if plain != self._plain:
            here, before = next(
                ((a, b) for a, b in zip(plain, self._plain, strict=False) if a != b), (plain, self._plain)
            )
            raise BatchError(
                f"forward returned {here!r:.40} for one micro-batch and {before!r:.40} for another. It is no tensor, "
                "so what it is for the whole batch is not known, and the loss would see the first one's. Return a "
                "tensor with one row for each sample, or take it from the batch, in batch_loss(outputs, batch)."
            )
        for place, (whole, tensor) in enumerate(zip(self.tensors, found, strict=True)):
            self.combination.put(whole, tensor, rows, samples, place)
        if self.combination.keeps_parts:
            self._parts.append(found)

    def whole(self) -> Any:
        """The whole batch's outputs, in the structure of a micro-batch's."""
        return rebuilt(self._structure, self.tensors)

    def leaves(self) -> list[Tensor]:
        """The tensors that can have a gradient, in order; they are made to require one."""
        for tensor in self.tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.requires_grad_()
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    def gradients(self, rows: Rows) -> list[Tensor | None]:
        """For each output tensor of the micro-batch of these rows its part of the loss's gradient; None for none."""
        return [
            None if tensor.grad is None else self.combination.part(tensor.grad, rows).to(dtype)
            for tensor, dtype in zip(self.tensors, self._dtypes, strict=True)
        ]

    def seen(self, index: int, rows: Rows) -> list[Tensor]:
        """The tensors that were put in for the micro-batch of this index and these rows."""
        if self.combination.keeps_parts:
            return self._parts[index]
        return [self.combination.part(tensor.detach(), rows) for tensor in self.tensors]

    def of_no_samples(self) -> Any:
        """The outputs of a piece of no samples: structure, shapes and dtypes, on the meta device."""
        none = [self.combination.part(tensor, slice(0, 0)) for tensor in self.tensors]
        return rebuilt(self._structure, [torch.empty_like(tensor, device="meta") for tensor in none])

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes gradients for `tensors` that were computed elsewhere."""
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is not None:
                tensor.requires_grad_().grad = gradient


def rebuilt(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """The same nesting with other tensors, in order."""
    following = iter(tensors)
    return tree.map_leaves(structure, lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf)
