"""A model's outputs, micro-batch by micro-batch, as the whole batch's.

    Concatenated   index 0 is the sample: rows go to where their samples are in the batch, in whatever order they ran
    Summed         statistics that add up over samples: only their sum is kept

Outputs are any nesting of tensors. The whole is made without a graph; its tensors are leaves, so that the loss's
gradient on the outputs can be read off them and pushed back into each micro-batch's own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import BatchError
from gradaccum.types import Rows

_HALF = (torch.float16, torch.bfloat16)


class Outputs(Protocol):
    """The whole batch's outputs while its micro-batches come in."""

    def put(self, rows: Rows, samples: int, outputs: Any) -> None:
        """Takes a micro-batch's outputs in; no graph is kept."""
        ...

    def leaves(self) -> list[Tensor]:
        """The tensors of `whole`, in order; those with a floating dtype are leaves that require a gradient."""
        ...

    def whole(self) -> Any:
        """The whole batch's outputs, in the structure of a micro-batch's."""
        ...

    def gradients(self, rows: Rows) -> list[Tensor | None]:
        """For each of a micro-batch's output tensors its part of the loss's gradient; None where there is none."""
        ...

    def seen(self, index: int, rows: Rows) -> list[Tensor]:
        """What the tensors of the micro-batch of this index were."""
        ...

    def tensors(self) -> list[Tensor]:
        """The tensors of `whole`, in order."""
        ...

    def described(self) -> tuple[Any, list[tuple[tuple[int, ...], torch.dtype]]]:
        """The structure, without data, and of each tensor the shape of a row (or of the sum) and its dtype."""
        ...

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes gradients for the tensors of `whole` that were computed elsewhere."""
        ...


class Concatenated:
    """Outputs with the sample first.

    Args:
        rows: of the whole batch.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._structure: Any = None
        self._tensors: list[Tensor] = []

    def put(self, rows: Rows, samples: int, outputs: Any) -> None:
        """See `Outputs`."""
        found = [tensor.detach() for tensor in tree.tensors(outputs)]
        if not self._tensors:
            _require_tensors(found)
            self._structure = _structure_of(outputs)
            self._tensors = [
                tensor.new_empty((self._rows, *_row_shape(tensor, samples, place)))
                for place, tensor in enumerate(found)
            ]
        _require_same_number(found, self._tensors)
        for place, (whole, tensor) in enumerate(zip(self._tensors, found, strict=True)):
            shape = _row_shape(tensor, samples, place)
            if shape != whole.shape[1:] or tensor.dtype != whole.dtype:
                raise BatchError(
                    f"Output {place} has rows of shape {tuple(shape)} ({tensor.dtype}) in one micro-batch and "
                    f"{tuple(whole.shape[1:])} ({whole.dtype}) in another, so they are not one tensor over the batch. "
                    "Return outputs of one shape for every sample: pooled over its length, say, where micro-batches "
                    "are trimmed to lengths of their own, or pass ga.split_by_cost(..., trim=False)."
                )
            whole[_index(rows, whole.device)] = tensor

    def leaves(self) -> list[Tensor]:
        """See `Outputs`."""
        return _leaves(self._tensors)

    def whole(self) -> Any:
        """See `Outputs`."""
        return _rebuilt(self._structure, self._tensors)

    def gradients(self, rows: Rows) -> list[Tensor | None]:
        """See `Outputs`."""
        return [None if tensor.grad is None else tensor.grad[_index(rows, tensor.device)] for tensor in self._tensors]

    def seen(self, index: int, rows: Rows) -> list[Tensor]:
        """See `Outputs`."""
        return [tensor.detach()[_index(rows, tensor.device)] for tensor in self._tensors]

    def tensors(self) -> list[Tensor]:
        """See `Outputs`."""
        return self._tensors

    def described(self) -> tuple[Any, list[tuple[tuple[int, ...], torch.dtype]]]:
        """See `Outputs`."""
        return self._structure, [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in self._tensors]

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """See `Outputs`."""
        for tensor, gradient in zip(self._tensors, gradients, strict=True):
            if gradient is not None:
                tensor.requires_grad_().grad = gradient


class Summed:
    """Outputs that are statistics: sums over a micro-batch's samples.

    Half-precision statistics are added up in fp32: at 1,000 micro-batches a bf16 sum would have stopped growing.
    """

    def __init__(self) -> None:
        self._structure: Any = None
        self._tensors: list[Tensor] = []
        self._parts: list[list[Tensor]] = []

    def put(self, rows: Rows, samples: int, outputs: Any) -> None:
        """See `Outputs`."""
        found = [tensor.detach() for tensor in tree.tensors(outputs)]
        if not self._tensors:
            _require_tensors(found)
            self._structure = _structure_of(outputs)
            self._tensors = [torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) for tensor in found]
        _require_same_number(found, self._tensors)
        for place, (total, tensor) in enumerate(zip(self._tensors, found, strict=True)):
            if tensor.shape != total.shape:
                raise BatchError(
                    f"Statistic {place} has shape {tuple(tensor.shape)} in one micro-batch and {tuple(total.shape)} in "
                    'another, so they cannot be added up. With combine="sum" forward returns sums over the '
                    "micro-batch's samples, whose shape does not depend on how many there are; for outputs with one "
                    'row for each sample leave combine="concat".'
                )
            total += tensor
        self._parts.append(found)

    def leaves(self) -> list[Tensor]:
        """See `Outputs`."""
        return _leaves(self._tensors)

    def whole(self) -> Any:
        """See `Outputs`."""
        return _rebuilt(self._structure, self._tensors)

    def gradients(self, rows: Rows) -> list[Tensor | None]:
        """See `Outputs`; the same for every micro-batch, since it is the derivative of a sum."""
        return [
            None if total.grad is None else total.grad.to(part.dtype)
            for total, part in zip(self._tensors, self._parts[0], strict=True)
        ]

    def seen(self, index: int, rows: Rows) -> list[Tensor]:
        """See `Outputs`."""
        return self._parts[index]

    def tensors(self) -> list[Tensor]:
        """See `Outputs`."""
        return self._tensors

    def described(self) -> tuple[Any, list[tuple[tuple[int, ...], torch.dtype]]]:
        """See `Outputs`."""
        return self._structure, [(tuple(tensor.shape), tensor.dtype) for tensor in self._tensors]

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """See `Outputs`."""
        for tensor, gradient in zip(self._tensors, gradients, strict=True):
            if gradient is not None:
                tensor.requires_grad_().grad = gradient


def _structure_of(outputs: Any) -> Any:
    return tree.map_leaves(outputs, lambda leaf: leaf.new_empty(0) if isinstance(leaf, Tensor) else leaf)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.requires_grad_()
    return [tensor for tensor in tensors if tensor.requires_grad]


def _rebuilt(structure: Any, tensors: Sequence[Tensor]) -> Any:
    following = iter(tensors)
    return tree.map_leaves(structure, lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf)


def _index(rows: Rows, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else rows.to(device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _row_shape(tensor: Tensor, samples: int, place: int) -> torch.Size:
    if tensor.dim() and tensor.shape[0] == samples:
        return tensor.shape[1:]
    raise BatchError(
        f"forward returned a tensor of shape {tuple(tensor.shape)} (output {place}) for a micro-batch of {samples} "
        f"samples. The loss is to see the whole batch's outputs in the batch's order, so each must have one row for "
        f"each sample, index 0. Two views of a sample: torch.stack([first, second], dim=1), not torch.cat. Statistics "
        'that add up over samples: combine="sum".'
    )


def _require_tensors(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise BatchError(
            "forward returned no tensor, so there is nothing that batch_loss could have a gradient of. Return the "
            "model's outputs: a tensor or any nesting of them."
        )


def _require_same_number(found: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    if len(found) != len(before):
        raise BatchError(
            f"forward returned {len(found)} tensors for one micro-batch and {len(before)} for another, so they are not "
            "the outputs of one batch. Return the same structure for every micro-batch."
        )
