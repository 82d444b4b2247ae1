"""The plain runner: each micro-batch forward, its loss, its backward; one graph alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradaccum import tree
from gradaccum.runners.accumulation import Accumulation, WeightsFunction, weights_by_name
from gradaccum.runners.prefetch import on_device
from gradaccum.types import Rows, Split


def run(
    accumulation: Accumulation,
    loss_of: Callable[[Any], Any],
    batch: Any,
    pieces: Sequence[Rows],
    *,
    split: Split,
    weights: WeightsFunction | None,
    device: torch.device,
    ran: Callable[[int], None],
) -> None:
    """Adds the gradients of one batch's micro-batches to the open window.

    Args:
        accumulation: its window is open, and stays open.
        loss_of: from a micro-batch on the device to its loss.
        batch: the whole batch, where the user keeps it.
        pieces: the rows of each micro-batch.
        split: what cuts them.
        weights: counts what each plain mean is over; None for samples.
        device: where the model is.
        ran: told after each micro-batch how many have run.
    """
    micro_batches = (split.cut(batch, piece) for piece in pieces)
    for done, micro_batch in enumerate(on_device(micro_batches, device), start=1):
        counted = None if weights is None else weights_by_name(weights(micro_batch))
        accumulation.add(loss_of(micro_batch), samples=tree.rows(micro_batch), weights=counted)
        ran(done)
