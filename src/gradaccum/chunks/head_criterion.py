"""A loss of torch together with the head that makes its logits, in chunks of rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from gradaccum.chunks.row_chunks import in_chunks
from gradaccum.errors import UnknownLossError
from gradaccum.losses.criterion import Criterion, TorchLoss
from gradaccum.losses.loss import Loss

Head = Callable[[Tensor], Tensor]


@overload
def criterion(loss: TorchLoss) -> Criterion: ...
@overload
def criterion(loss: TorchLoss, *, head: Head, chunk: int = 1024) -> HeadCriterion: ...
def criterion(loss: TorchLoss, *, head: Head | None = None, chunk: int = 1024) -> Criterion | HeadCriterion:
    r"""Wraps a loss of torch so that it returns a `Loss` with the right weight.

        value = (\sum_i l_i) / w        w: elements, samples, targets that count, class weights, sequences, ...

    The weight is an int where it follows from shapes, and a 0-d tensor on the data's device where it depends on the
    targets: there is no synchronisation with the device. A reduction of "sum" stays a sum.

    With a ``head`` the criterion takes what the head gets instead of the logits, and runs both in chunks of rows, as
    `chunked` does: the logits of one chunk are alive at a time, and rows with an ignored label are never run.

    Args:
        loss: an instance of a loss class of ``torch.nn``, its functional form, or a ``functools.partial`` of that. It
            may be of a subclass that inherits ``forward``. A module is read at every call and never changed: it stays
            yours to move, to save and to optimize. Hooks registered on it do not run.
        head: makes the logits [rows, classes] of ``hidden`` [rows, features]. Where ``fully_shard`` was called on it,
            its parameters are gathered once a call, and of its hooks none run.
        chunk: rows in a chunk, where there is a ``head``.

    Returns:
        A callable that takes what ``loss`` takes; for a functional form also its options, such as ``ignore_index``.
        With a ``head``: ``(hidden, labels)``, [..., features] and [...].

    Raises:
        UnknownLossError: ``loss`` is none of torch's, or its reduction is "none".

    Example:
        >>> criterion = ga.criterion(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), ignore_index=-1))
        >>> loss = criterion(torch.zeros(3, 2), torch.tensor([0, 1, -1]))
        >>> loss.value, loss.weight
        (tensor(0.6931), tensor(4.))
        >>> ga.criterion(F.mse_loss)(torch.zeros(3, 2), torch.ones(3, 2)).weight
        6
        >>> lm_head = nn.Linear(8, 100)
        >>> criterion = ga.criterion(nn.CrossEntropyLoss(), head=lm_head, chunk=16)
        >>> criterion(torch.zeros(2, 20, 8), torch.zeros(2, 20, dtype=torch.long)).weight
        tensor(40)
    """
    return Criterion(loss) if head is None else HeadCriterion(Criterion(loss), head, chunk)


@dataclass(frozen=True, slots=True)
class HeadCriterion:
    """A criterion and the head before it, in chunks; made by `criterion`."""

    criterion: Criterion
    head: Head
    chunk: int

    def __post_init__(self) -> None:
        if not callable(self.head):
            raise UnknownLossError(
                f"ga.criterion got head={self.head!r}, which makes no logits, so there is no loss and no gradient. "
                "Pass the last layer itself: head=model.lm_head, or a function of hidden."
            )

    def __call__(self, hidden: Tensor, *targets: Tensor) -> Loss:
        """Computes the loss of one micro-batch.

        Raises:
            BatchError: labels do not have the leading shape of ``hidden``.
            UnsupportedError: as `chunked` does.
        """
        label = self.criterion.ignored_label(targets[0]) if targets else None
        is_per_row = bool(targets) and targets[0].dim() == hidden.dim() - 1
        with gathered(self.head) as head:
            return in_chunks(
                lambda rows, *of_rows: self.criterion(head(rows), *of_rows),
                hidden,
                targets,
                size=self.chunk,
                ignored=None if label is None or not is_per_row else (0, label),
            )


@contextmanager
def gathered(head: Head) -> Iterator[Head]:
    """A head whose parameters are whole meanwhile.

    FSDP2's hooks would gather the parameters once for each chunk, and again in its backward; ranks with other numbers
    of chunks would then wait for each other for ever. So its forward is called without them. The gradient is FSDP2's to
    reduce all the same: it does that at the end of the backward for modules whose own hooks did not run.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second, and then it is there
    if fsdp is None or not isinstance(head, fsdp.FSDPModule):
        yield head
        return
    sharded: Any = head
    sharded.unshard()
    dtype = next((parameter.dtype for parameter in sharded.parameters()), None)
    forward: Any = sharded.forward
    try:
        yield lambda rows: forward(rows.to(dtype))
    finally:
        sharded.reshard()
