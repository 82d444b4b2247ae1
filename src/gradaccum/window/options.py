"""The options that both ways of training have in common, checked once, at construction."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum.errors import OptionError, ParameterError, UnsupportedError, WindowError
from gradaccum.gradients.fused.choice import FusedOption, choice_of
from gradaccum.gradients.given_backward import BackwardFunction
from gradaccum.gradients.gradient_buffers import check_persistent, checked_accumulate_dtype
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.sync.detect import Sync
from gradaccum.window.option_names import check_flag
from gradaccum.window.update import Updater


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
    backward: BackwardFunction | None = None
    noise_scale: bool = False

    def __post_init__(self) -> None:
        choice_of(self.fused)
        checked_accumulate_dtype(self.accumulate_dtype)
        if self.backward is not None:
            self._check_backward(self.backward)
        self._check_types()
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
            _check_scheduler(scheduler)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ParameterError(
                    "ReduceLROnPlateau is advanced with a validation metric, which an update does not have. Leave it "
                    "out here and call scheduler.step(metric) after each validation."
                )

    def _check_types(self) -> None:
        """Checks for values that would fail in the first update, inside of torch, or be taken for true."""
        norm: Any = self.clip_norm
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (numbers.Real, Tensor))):
            raise OptionError(
                f"clip_norm={norm!r} is of type {type(norm).__name__}; it is the largest norm of the whole gradient, a "
                'number. Pass clip_norm=1.0, or float("inf") to measure without clipping.'
            )
        if self.scaler is not None and not callable(getattr(self.scaler, "unscale_", None)):
            raise OptionError(
                f"scaler={self.scaler!r} is of type {type(self.scaler).__name__}, which cannot scale a loss. Pass "
                'scaler=torch.amp.GradScaler("cuda"); bf16 needs none.'
            )
        check_flag("persistent_gradients", self.persistent_gradients)
        check_flag("noise_scale", self.noise_scale)
        check_flag("collectives", self.collectives)

    def _check_backward(self, backward: Any) -> None:
        if not callable(backward):
            raise ParameterError(
                f"backward= is a {type(backward).__name__}, and runs the backward of every micro-batch. Pass a "
                "function that is called function(root, gradient=seed): accelerator.backward, fabric.backward."
            )
        if self.fused is True:
            raise ParameterError(
                "fused=True adds gradients up in place inside of the library's own backward, and backward= runs "
                "another one. Leave fused= out: with backward= the gradients are added as torch does it, to the same "
                "sum."
            )

    @property
    def schedulers(self) -> list[Any]:
        """The learning-rate schedulers, none, one or several."""
        if self.scheduler is None:
            return []
        several = list(self.scheduler) if isinstance(self.scheduler, (list, tuple)) else [self.scheduler]
        return [_unwrapped(scheduler) for scheduler in several]

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

    def updater(self, optimizers: Sequence[Optimizer], *, narrow: Callable[[], None]) -> Updater:
        """What makes updates with these options; ``narrow`` as there, where gradients are of more precision."""
        clip_norm = self.clip_norm
        if clip_norm is None and self.noise_scale:
            clip_norm = math.inf
        return Updater(
            optimizers,
            clip_norm=clip_norm,
            schedulers=self.schedulers,
            scaler=self.scaler,
            before_step=self.before_step,
            narrow=None if self.accumulate_dtype is None else narrow,
        )

    def gradient_sum(self, named: Sequence[tuple[str, nn.Parameter]], *, has_shards: bool) -> GradientSum:
        """Where the gradients of these parameters add up with these options."""
        return GradientSum(
            named,
            fused=self.fused,
            accumulate_dtype=self.accumulate_dtype,
            persistent=self.persistent_gradients,
            has_shards=has_shards,
            backward=self.backward,
        )


def _unwrapped(scheduler: Any) -> Any:
    """The scheduler that accelerate's wrapper steps, which skips steps that are not its own."""
    inner = getattr(scheduler, "scheduler", None)
    return inner if inner is not None and type(scheduler).__module__.startswith("accelerate.") else scheduler


def _check_scheduler(scheduler: Any) -> None:
    """Checks that a scheduler can be advanced once an update, before the first one is made.

    Raises:
        ParameterError: it cannot.
    """
    step = getattr(scheduler, "step", None)
    inner = scheduler.get("scheduler") if isinstance(scheduler, dict) else getattr(scheduler, "scheduler", None)
    if not callable(step):
        where = " The one inside of it is: scheduler=config.scheduler." if inner is not None else ""
        raise ParameterError(
            f"scheduler={type(scheduler).__name__}: it has no step() to advance the learning rate with.{where} Pass a "
            "scheduler of torch.optim.lr_scheduler, or a sequence of them."
        )
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return  # which has an error of its own
        updates = " Its step_update(num_updates) counts updates:" if hasattr(scheduler, "step_update") else ""
        raise ParameterError(
            f"{type(scheduler).__name__}.step{inspect.signature(step)} needs arguments that an update does not have "
            f"({error}).{updates} Leave scheduler= out, and advance it in your loop, where update.index counts updates."
        ) from error
    except ValueError:  # a function without a signature
        return
