"""What one process has of each term of the loss, in messages, and what all of them have together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.errors import LossError
from gradaccum.losses.loss import Loss
from gradaccum.losses.normaliser import Number
from gradaccum.sync.messages import Message, TermKind, TermShare
from gradaccum.sync.ranks import Ranks

Share = Mapping[str, tuple[Tensor, Number | None]]
"""Each term's sum and weight; see `Normaliser.share`."""


def term_of(share: tuple[Tensor, Number | None] | None, device: torch.device) -> TermShare:
    """What a message says of one term of this process; what lies on the device is added up there."""
    if share is None:
        return TermShare()
    total, weight = share
    is_on_host = device.type == "cpu"
    number = total.item() if is_on_host else 0.0
    if weight is None:
        return TermShare(TermKind.PLAIN_SUM, 0.0, number)
    if is_on_host or not isinstance(weight, Tensor):
        return TermShare(TermKind.ON_HOST, float(weight), number)
    return TermShare(TermKind.ON_DEVICE, 0.0, number)


def added_shares(
    ranks: Ranks, names: Sequence[str], messages: Sequence[Message], share: Share, *, lone: torch.dtype
) -> dict[str, tuple[Tensor, Number | None]]:
    """Each term's sum and weight over all processes.

    Args:
        ranks: the processes.
        names: of the terms, in the order of the messages.
        messages: of all processes.
        share: this process's.
        lone: dtype of a parameter.

    Raises:
        LossError: the loss is a sum on one process and a mean on another.
    """
    on_device = None if ranks.device.type == "cpu" else _added_on_device(ranks, names, share)
    # A process without samples has the dtype of its parameters, which the others' losses most likely have too.
    lone_dtype = torch.promote_types(lone, torch.float32) if lone.is_floating_point else torch.float32
    dtype = next((total.dtype for total, _ in share.values()), lone_dtype)
    found: dict[str, tuple[Tensor, Number | None]] = {}
    for i, name in enumerate(names):
        terms = [message.terms[i] for message in messages]
        kinds = {term.kind for term in terms} - {TermKind.ABSENT}
        if not kinds:
            continue
        if TermKind.PLAIN_SUM in kinds and len(kinds) > 1:
            raise LossError(
                "The loss is a sum without `over` on one process, and has a weight on another. The one is not to "
                "be divided by anything, the other is; their gradients cannot be added up. Return the same kind "
                "everywhere: ga.Loss.sum(total, over=n)."
            )
        # Counts were ints before they travelled, and are again.
        weight: Number = sum(int(term.weight) if term.weight.is_integer() else term.weight for term in terms)
        total = torch.tensor(sum(term.total for term in terms), dtype=dtype)
        if on_device is not None:
            total = on_device[2 * i].to(dtype)
            weight = weight if TermKind.ON_DEVICE not in kinds else weight + on_device[2 * i + 1]
        found[name] = total, None if TermKind.PLAIN_SUM in kinds else weight
    return found


def _added_on_device(ranks: Ranks, names: Sequence[str], share: Share) -> Tensor:
    """Sum and weight of each term, as far as they lie on devices, added up there."""
    device = ranks.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    mine = torch.zeros(2 * len(names), dtype=wide, device=device)
    for i, name in enumerate(names):
        for place, number in enumerate(share.get(name, ())):
            if isinstance(number, Tensor):
                mine[2 * i + place] = number.to(wide)
    ranks.add_up(mine)
    return mine


def roots_of(made: Any) -> list[Tensor]:
    """What the backward of a loss, of several by name, or of outputs begins with."""
    several = list(made.values()) if isinstance(made, dict) else [made]
    found = [one.root if isinstance(one, Loss) else one for one in several]
    return [tensor for tensor in tree.tensors(found) if tensor.requires_grad]
