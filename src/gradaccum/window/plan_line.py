"""What a run tells about itself: the plan line, and the warning of layers that see the micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from gradaccum.window import guards
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.progress import plan_line

logger = logging.getLogger("gradaccum")


class Telling:
    """Each thing the first time it has to be said.

    Args:
        couples_batch_norms: whether BatchNorm in training mode sees single micro-batches.
    """

    def __init__(self, *, couples_batch_norms: bool = True) -> None:
        self._couples_batch_norms = couples_batch_norms
        self._has_told = self._has_told_of_split = False

    def coupled_layers(self, models: Sequence[nn.Module]) -> list[str]:
        """Qualified names of the layers that see the micro-batch."""
        return guards.coupled_batch_norms(models) if self._couples_batch_norms else []

    def has_to_tell(self, sizes: Sequence[int | None]) -> bool:
        """Whether there is anything to say before a window of these sizes that has not been said."""
        return bool(sizes) and not (self._has_told and (self._has_told_of_split or len(sizes) == 1))

    def tell(
        self,
        sizes: Sequence[int | None],
        models: Sequence[nn.Module],
        ranks: OverRanks | None,
        *,
        updates_per_epoch: int | None = None,
        is_final: bool = True,
    ) -> None:
        """Logs the plan line, on one of several processes, and warns of layers that see the micro-batch.

        Args:
            sizes: rows of each micro-batch of the window to come.
            models: whose layers they go through.
            ranks: the processes that train together; None where there is one.
            updates_per_epoch: None where unknown.
            is_final: whether later windows will be cut alike; the line waits for that.
        """
        is_split = len(sizes) > 1
        if not is_final and not (is_split and not self._has_told_of_split):
            return
        if not self.has_to_tell(sizes):
            return
        coupled = self.coupled_layers(models)
        if is_final and not self._has_told and (ranks is None or ranks.is_first):
            over = None if ranks is None else ranks.description
            logger.info(plan_line(sizes, coupled_layers=len(coupled), updates_per_epoch=updates_per_epoch, ranks=over))
        if coupled and is_split:
            guards.warn_of_batch_norms(coupled, micro_batches=len(sizes))
        self._has_told = self._has_told or is_final
        self._has_told_of_split = is_split
