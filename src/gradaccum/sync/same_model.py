"""Processes that train together meet for the first time: that they have the same model, and start from the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gradaccum.errors import RankError
from gradaccum.sync.ranks import Ranks

_OF_A_SUM = 1e-9  # float64 sums of equal numbers on unlike processors; seeds that differ do so in the first digits


def meet_for_the_first_time(ranks: Ranks, signature: int, parameters: Sequence[Tensor]) -> None:
    """Introduces the processes to each other.

    Args:
        ranks: all of which call this.
        signature: of names, shapes and dtypes of the parameters.
        parameters: those that every process has whole, and that must be equal; none where nothing can be compared.

    Raises:
        RankError: the models differ, or the parameters that they start from.
    """
    checksum = float(sum(_sum_of(parameter) for parameter in parameters)) if parameters else None
    about = ranks.introduce((signature, checksum))
    if len({theirs for theirs, _ in about}) > 1:
        raise RankError(
            "The processes have different models: names, shapes or dtypes of their parameters differ. Their "
            "gradients cannot be added up. Build the same model on every process."
        )
    known = [one for _, one in about if one is not None and math.isfinite(one)]
    if known and max(known) - min(known) > _OF_A_SUM * (1 + max(map(abs, known))):
        shown = ", ".join(f"{one:.6g}" for one in known[:4])
        raise RankError(
            f"The processes start from different parameters (they add up to {shown}, ...), so each would go on "
            "with a model of its own, whatever their gradients. Call torch.manual_seed with the same number on "
            "every process before the model is made, or wrap it in DistributedDataParallel, which hands out rank "
            "0's."
        )


def _sum_of(parameter: Tensor) -> float:
    return parameter.detach().double().sum().item() if parameter.device.type != "mps" else 0.0
