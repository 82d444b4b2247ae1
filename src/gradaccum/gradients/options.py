"""How gradients add up, as the user wants it: one object, from both ways to train down to where it is done."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gradaccum.gradients.fused.choose import Choice, FusedOption, choice_of
from gradaccum.gradients.wide import checked_accumulate_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientOptions:
    """The options of `Accumulator` and `TrainStep` that are about gradients.

    Attributes:
        fused: whether weight gradients are added up in place.
        accumulate_dtype: what gradients of low precision are added up in; None for their own.
        choice: for which weights ``fused`` pays; None for none.

    Raises:
        ParameterError: an option is none of its values.
        UnsupportedError: this torch cannot do it.
    """

    fused: FusedOption = "auto"
    accumulate_dtype: torch.dtype | None = None
    choice: Choice | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", choice_of(self.fused))
        checked_accumulate_dtype(self.accumulate_dtype)
