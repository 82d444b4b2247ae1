"""What a run says of itself, each the first time it has to: the plan line, and layers that see the micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from gradaccum import guards
from gradaccum.progress import plan_line

logger = logging.getLogger("gradaccum")


class Announcements:
    """Says things once.

    Args:
        models: whose layers are looked at.
        couples_batch_norms: whether BatchNorm in training mode sees single micro-batches.
    """

    def __init__(self, models: Sequence[nn.Module], *, couples_batch_norms: bool) -> None:
        self._models = models
        self._couples_batch_norms = couples_batch_norms
        self._has_told = self._has_told_of_split = False

    def coupled_layers(self) -> list[str]:
        """Qualified names of the layers that see the micro-batch."""
        return guards.coupled_batch_norms(self._models) if self._couples_batch_norms else []

    def tell(self, sizes: Sequence[int | None], *, updates_per_epoch: int | None, is_final: bool) -> None:
        """Logs the plan line, and warns of layers that see the micro-batch; each the first time it has to.

        Args:
            sizes: rows of each micro-batch of the window to come.
            updates_per_epoch: None where unknown.
            is_final: whether later windows will be cut alike; the line waits for that.
        """
        is_split = len(sizes) > 1
        if not is_final and not (is_split and not self._has_told_of_split):
            return
        if self._has_told and (self._has_told_of_split or not is_split):
            return
        coupled = self.coupled_layers()
        if is_final and not self._has_told:
            logger.info(plan_line(sizes, coupled_layers=len(coupled), updates_per_epoch=updates_per_epoch))
        if coupled and is_split:
            guards.warn_of_batch_norms(coupled, micro_batches=len(sizes))
        self._has_told = self._has_told or is_final
        self._has_told_of_split = is_split
