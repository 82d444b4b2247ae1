"""The options that both ways of training have in common, checked once, at construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.errors import ParameterError, UnsupportedError, WindowError
from gradaccum.gradients.fused.choice import FusedOption, choice_of
from gradaccum.gradients.gradient_buffers import check_persistent, checked_accumulate_dtype
from gradaccum.sync.detect import Sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `Accumulator` and `TrainStep` were told; `Accumulator` documents each option.

    Raises:
        ParameterError: an option has none of its values.
        WindowError: a norm to clip to that is not positive.
        UnsupportedError: this torch cannot do it.
    """

    clip_norm: float | None = None
    scheduler: Any = None
    scaler: GradScaler | None = None
    fused: FusedOption = "auto"
    accumulate_dtype: torch.dtype | None = None
    persistent_gradients: bool = False
    sync: Sync = "auto"
    timeout: float | None = None
    process_group: Any = None
    collectives: bool = False
    before_step: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        choice_of(self.fused)
        checked_accumulate_dtype(self.accumulate_dtype)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise WindowError(
                f"clip_norm={self.clip_norm}: clipping to it would erase or reverse every gradient. Pass a positive "
                'norm, float("inf") to measure without clipping, or None.'
            )
        if self.before_step is not None and not callable(self.before_step):
            raise ParameterError(
                f"before_step={self.before_step!r} is called once an update, without arguments, before the optimizer "
                "steps. Pass a function: before_step=lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0)."
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ParameterError(
                f"timeout={self.timeout!r}: it is how many seconds a message between processes waits for the others, "
                "longer than what one of them may do alone (a validation, say). Pass a positive number, or None for "
                "the process group's own timeout."
            )
        for scheduler in self.schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ParameterError(
                    "ReduceLROnPlateau is advanced with a validation metric, which an update does not have. Leave it "
                    "out here and call scheduler.step(metric) after each validation."
                )

    @property
    def schedulers(self) -> list[Any]:
        """The learning-rate schedulers, none, one or several."""
        if self.scheduler is None:
            return []
        return list(self.scheduler) if isinstance(self.scheduler, (list, tuple)) else [self.scheduler]

    def check_with(self, optimizers: Sequence[Optimizer], *, has_ranks: bool, has_own: bool = False) -> None:
        """Checks that the options go with these optimizers and, with ``has_ranks``, with several processes.

        ``has_own`` says that some parameters are each process's own.

        Raises:
            ParameterError: they do not go with the optimizers.
            UnsupportedError: they do not go with several processes.
        """
        if has_own and self.scaler is not None and self.scaler.is_enabled():
            raise UnsupportedError(
                "DistributedDataParallel was told to leave some parameters alone, and a GradScaler looks for overflows "
                "in each process's own gradients: one process would skip an update that the others make. Train in "
                "bf16, without scaler=."
            )
        if self.persistent_gradients:
            check_persistent(optimizers, has_ranks=has_ranks)
