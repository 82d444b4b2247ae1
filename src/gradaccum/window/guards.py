"""Watches for what makes a sum of micro-batches something else than the batch.

Checked once: that optimizer and model belong together, that no layer couples samples. Checked while a window is open:
that nobody steps the optimizer, zeroes its gradients or advances the schedule by hand.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from gradaccum.errors import (
    BatchNormWarning,
    DiscardedWindowWarning,
    MisuseError,
    ParameterError,
    UnsupportedError,
)
from gradaccum.window.checked_calls import checked_before

_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FUNCTOOLS = os.path.abspath(functools.__file__)
_CONTEXTLIB = os.path.abspath(contextlib.__file__)
_MAX_SHOWN = 3
logger = logging.getLogger("gradaccum")


def as_sequence(one_or_many: Any, kind: type, *, name: str) -> list[Any]:
    """The argument as a list, whether it was one object or a sequence of them."""
    many = [one_or_many] if isinstance(one_or_many, kind) else one_or_many
    if not isinstance(many, (list, tuple)) or not many or not all(isinstance(one, kind) for one in many):
        raise ParameterError(
            f"{name} must be a torch {kind.__name__} or a non-empty sequence of them, and is {_described(one_or_many)}."
        )
    return list(many)


def as_list(one_or_many: Any) -> list[Any]:
    """The argument as a list, whether it was None, one object or a sequence of them."""
    if one_or_many is None:
        return []
    return list(one_or_many) if isinstance(one_or_many, (list, tuple)) else [one_or_many]


def named_parameters(models: Sequence[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of all models once, shared ones under their first name."""
    if len(models) == 1:
        return list(models[0].named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            found.setdefault(id(parameter), (f"{i}.{name}", parameter))
    return list(found.values())


def check_parameters(named: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[Optimizer]) -> None:
    """That the optimizers train parameters of the models, each at most once, and at least one.

    Raises:
        ParameterError: they do not.
    """
    own = {id(parameter) for _, parameter in named}
    owned_by: dict[int, int] = {}
    trainable = 0
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in own:
                    raise ParameterError(
                        f"Parameter group {j} of {type(optimizer).__name__} holds a parameter of shape "
                        f"{tuple(parameter.shape)} that is none of the model's {len(own)}. Its gradient would be "
                        "neither normalised nor cleared. Pass every model that the optimizer trains: model=[first, "
                        "second]; a parameter that belongs to a loss goes into an nn.Module of its own."
                    )
                if owned_by.setdefault(id(parameter), i) != i:
                    raise ParameterError(
                        f"Two of the optimizers hold the same parameter of shape {tuple(parameter.shape)}; it would be "
                        "updated twice from one gradient. Give each parameter to one optimizer."
                    )
                trainable += parameter.requires_grad
    if not trainable:
        raise ParameterError(
            f"There is nothing to train: none of the {len(owned_by)} parameters of the optimizer requires a gradient. "
            "Every update would leave the model as it is. Call parameter.requires_grad_() on those to train, before "
            "the optimizer is made."
        )


def refuse_closures(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that evaluate the loss several times in one update."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                "LBFGS evaluates the loss several times for one update, and the batch is gone after the first. With "
                "the whole batch in hand: def closure(): optimizer.zero_grad(); return "
                "train_step.backward(batch).value, and optimizer.step(closure)."
            )


def refuse_data_parallel(models: Sequence[nn.Module]) -> None:
    """Refuses models that other processes would be waited for with, where only this one runs them."""
    for model in models:
        for module in model.modules():
            name = type(module).__name__
            if name in ("DistributedDataParallel", "FullyShardedDataParallel") or name.startswith("FSDP"):
                raise UnsupportedError(
                    f"The model is wrapped in {name}, whose forward and backward wait for other processes, and here "
                    "one process looks at it by itself. Pass the plain module, before it is wrapped."
                )


def coupled_batch_norms(models: Sequence[nn.Module]) -> list[str]:
    """Qualified names of the BatchNorm layers that would normalise with the micro-batch's own statistics."""
    return [
        name or type(module).__name__
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


def warn_of_batch_norms(names: Sequence[str], *, micro_batches: int) -> None:
    """Says which layers make the gradient another than the whole batch's."""
    shown = ", ".join(names[:_MAX_SHOWN]) + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
    warnings.warn(
        f"{len(names)} BatchNorm layer{'s' if len(names) > 1 else ''} in training mode ({shown}) will normalise each "
        f"of the {micro_batches} micro-batches with its own statistics, not the batch's, so the gradient is not the "
        f"whole batch's, and running statistics advance {micro_batches} times an update. With ga.TrainStep: "
        'batch_norm="exact" takes the whole batch\'s statistics, "frozen" the running ones (for fine-tuning), '
        "ga.GhostBatch(n) those of fixed groups. Otherwise freeze them (module.eval()), or use GroupNorm or LayerNorm.",
        BatchNormWarning,
        stacklevel=user_stack_level(),
    )


def user_line() -> str:
    """``file:line`` of the nearest frame that is neither the library's nor torch's."""
    for frame in _frames():
        if not _is_inside(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown line"


def user_stack_level() -> int:
    """The ``stacklevel`` with which a warning given by the caller points at the user's line."""
    for level, frame in enumerate(_frames()):
        if not _is_inside(frame.f_code.co_filename):
            return level + 1
    return 1


def _frames() -> Iterator[FrameType]:
    """From the function that asked outwards."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_inside(filename: str) -> bool:
    return os.path.abspath(filename).startswith((_LIBRARY, _TORCH, _FUNCTOOLS, _CONTEXTLIB))


def second_backward() -> MisuseError:
    """The error for a loss that comes when its micro-batch has had one."""
    return MisuseError(
        f"backward() was called at {user_line()} a second time for one micro-batch, whose window may have been applied "
        "already. Add the losses up and call it once; if they are means over different things, return them as a dict "
        "and give weights=."
    )


def uncounted_backward() -> MisuseError:
    """The error for a loss outside of a pass, where samples are not seen."""
    return MisuseError(
        f"backward() was called at {user_line()}, outside of over(), where samples cannot be counted towards "
        "batch_size. Take the micro-batches from accumulator.over(loader), or pass micro_batches=."
    )


def tell_lost(micro_batches: int, samples: int) -> None:
    """Warns that a half window was discarded."""
    message = (
        f"{micro_batches} micro-batches ({samples} samples) were accumulated and never applied: their window was "
        "left before it was complete. Their gradients were discarded."
    )
    if sys.exc_info()[0] is None:
        warnings.warn(message, DiscardedWindowWarning, stacklevel=user_stack_level())
    else:  # an error is being handled, and a warning turned into an error would take its place
        logger.warning(message)


class Held:
    """A context that is entered in one place and left in another; closing it costs nothing where it holds none."""

    def __init__(self) -> None:
        self._context: AbstractContextManager[Any] | None = None

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Holds it, instead of one that was held before."""
        self.close()
        context.__enter__()
        self._context = context

    def close(self) -> None:
        """Leaves what is held, if anything."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


@contextmanager
def no_calls_by_hand(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    *,
    open_micro_batches: Callable[[], int],
    is_ours: Callable[[], bool],
) -> Iterator[None]:
    """Makes calls of ``optimizer.step``, ``zero_grad`` and ``scheduler.step`` errors where they break a window.

    Args:
        optimizers: left as they were afterwards, like the schedulers.
        schedulers: those that the library advances.
        open_micro_batches: how many micro-batches the open window holds; 0 between windows.
        is_ours: whether the library itself is making the update.
    """

    def refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_ours() and open_micro_batches():
            raise MisuseError(
                f"optimizer.step() was called at {user_line()}, inside a window, after {open_micro_batches()} of its "
                "micro-batches. It would update with a part of the batch's gradient. Remove the call: "
                "accumulator.backward() steps when the window is complete."
            )

    def refuse_zero_grad() -> None:
        if not is_ours() and open_micro_batches():
            raise MisuseError(
                f"optimizer.zero_grad() was called at {user_line()}, inside a window, after {open_micro_batches()} of "
                "its micro-batches, whose gradients it would throw away. Remove the call: gradients are cleared after "
                "each update."
            )

    def refuse_schedule() -> None:
        if not is_ours():
            raise MisuseError(
                f"scheduler.step() was called at {user_line()}, and this scheduler was passed to the accumulator, "
                "which advances it once for each update. The learning rate would change too fast. Remove the call, or "
                "do not pass scheduler=."
            )

    with ExitStack() as held:
        for optimizer in optimizers:
            held.callback(optimizer.register_step_pre_hook(refuse_step).remove)
            held.enter_context(checked_before(optimizer, "zero_grad", refuse_zero_grad))
        for scheduler in schedulers:
            held.enter_context(checked_before(scheduler, "step", refuse_schedule))
        yield


def _described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of " + (
            ", ".join(type(one).__name__ for one in value[:_MAX_SHOWN]) or "nothing"
        )
    return f"a {type(value).__name__}"
