"""How gradients add up, as the user wants it: one object, from both ways to train down to where it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.optim import Optimizer

from gradaccum.errors import ParameterError
from gradaccum.gradients.fused.choose import Choice, FusedOption, choice_of
from gradaccum.gradients.momentum import check_optimizers, check_rest
from gradaccum.gradients.persistent import check_persistent
from gradaccum.gradients.wide import checked_accumulate_dtype

AccumulateInto = Literal["grad", "momentum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientOptions:
    """The options of `Accumulator` and `TrainStep` that are about gradients.

    Attributes:
        fused: whether weight gradients are added up in place.
        accumulate_dtype: what gradients of low precision are added up in; None for their own.
        accumulate_into: where they add up: in ``.grad``, or in the momentum buffers of SGD.
        persistent: whether gradients are in the same memory in every window.
        choice: for which weights ``fused`` pays; None for none.

    Raises:
        ParameterError: an option is none of its values, or does not go with another.
        UnsupportedError: this torch cannot do it.
    """

    fused: FusedOption = "auto"
    accumulate_dtype: torch.dtype | None = None
    accumulate_into: AccumulateInto = "grad"
    persistent: bool = False
    choice: Choice | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", choice_of(self.fused))
        checked_accumulate_dtype(self.accumulate_dtype)
        if self.accumulate_into not in ("grad", "momentum"):
            raise ParameterError(
                f"accumulate_into={self.accumulate_into!r}: gradients add up in the parameters' .grad "
                '(accumulate_into="grad"), or in the momentum buffers of torch.optim.SGD ("momentum"), without memory '
                "of their own. The update is the same."
            )
        if self.into_momentum and self.accumulate_dtype is not None:
            raise ParameterError(
                f'accumulate_into="momentum" with accumulate_dtype={self.accumulate_dtype}: the sum is kept in the '
                "momentum buffer, which has the parameter's own dtype, so it would be rounded as often as without. "
                "Leave one of the two out."
            )
        if self.into_momentum and self.persistent:
            raise ParameterError(
                'accumulate_into="momentum" with persistent_gradients=True: the gradients have no memory of their own '
                "that could stay, the momentum buffers stay anyway. Leave one of the two out."
            )

    @property
    def into_momentum(self) -> bool:
        """Whether gradients add up in momentum buffers."""
        return self.accumulate_into == "momentum"

    def check_rest(
        self, optimizers: Sequence[Optimizer], *, clip_norm: float | None, has_scaler: bool, has_ranks: bool
    ) -> None:
        """That these options go with the others.

        Raises:
            ParameterError: not with these optimizers.
            UnsupportedError: not with another option, or several processes.
        """
        if self.into_momentum:
            check_optimizers(optimizers)
            check_rest(clip_norm=clip_norm, has_scaler=has_scaler, has_ranks=has_ranks)
        if self.persistent:
            check_persistent(optimizers, has_ranks=has_ranks)
