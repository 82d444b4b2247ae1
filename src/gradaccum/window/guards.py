"""Calls by hand that would break a window: an optimizer's step or zero_grad, a scheduler's step, a second backward.

Torch has a hook for ``optimizer.step()``. For ``zero_grad()`` and ``scheduler.step()`` it has none, so these objects
are of a derived class while a pass runs. An attribute of the object would be simpler, but the ``state_dict()`` of
torch's schedulers is their ``__dict__``, and a state saved inside of a pass would hold the attribute too. The derived
class is made once for each class: it holds nothing of a training run, and Python, which remembers of each class how its
attributes are found, need not find out anew in every pass (12 us a step of SGD).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from gradaccum.errors import DiscardedWindowWarning, GradAccumWarning, MisuseError

_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FUNCTOOLS = os.path.abspath(functools.__file__)
_CONTEXTLIB = os.path.abspath(contextlib.__file__)
logger = logging.getLogger("gradaccum")


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


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks of the user's run before the optimizer steps, and see its gradients."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    if not own and not _global_optimizer_pre_hooks:
        return False
    hooks = [*own.values(), *_global_optimizer_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) != __name__ for hook in hooks)  # those above only look who steps


def user_line() -> str:
    """``file:line`` of the nearest frame that is neither the library's nor torch's."""
    for frame in _frames():
        if not _is_inside(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown line"


def add_user_line(error: MisuseError) -> None:
    """Adds the user's line to an error, where what raised it did not know of lines."""
    error.args = (f"{error} (Seen at {user_line()}.)",)


def user_stack_level() -> int:
    """The ``stacklevel`` with which a warning given by the caller points at the user's line."""
    for level, frame in enumerate(_frames()):
        if not _is_inside(frame.f_code.co_filename):
            return level + 1
    return 1


def warn(text: str) -> None:
    """Gives a warning that points at the user's line, and names it."""
    warnings.warn(f"{text} (at {user_line()})", GradAccumWarning, stacklevel=user_stack_level())


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
        "batch_size. Take the micro-batches from accumulator.over(loader), say accumulator.backward(loss, samples=n), "
        "or pass micro_batches=."
    )


def no_backward(samples: int | None) -> MisuseError:
    """The error for a micro-batch that `over` has handed out, and that was never added."""
    rows = "" if samples is None else f" of {samples} samples"
    return MisuseError(
        f"A micro-batch{rows} was taken from over() at {user_line()} and backward() was not called for it; the update "
        "would silently be made without it. Call accumulator.backward(loss) once for each; for one that is to be left "
        "out: accumulator.backward(ga.Loss.sum(torch.zeros(()), over=0))."
    )


def flush_inside() -> MisuseError:
    """The error for a flush inside of a pass."""
    return MisuseError(
        f"flush() was called at {user_line()}, inside a pass, whose windows close by themselves. Call it after the "
        "loop."
    )


def left_open(micro_batches: int) -> MisuseError:
    """The error for a pass that begins while a window is open that was begun outside of one."""
    return MisuseError(
        f"A window was left open: {micro_batches} micro-batches were added up outside of a pass and not applied, and "
        f"a pass begins at {user_line()}, which would be mixed with them. Call accumulator.flush() first, "
        "which applies them."
    )


def nested_step(micro_batches: int) -> MisuseError:
    """The error for a step that is called while it runs another batch."""
    return MisuseError(
        f"The step was called at {user_line()} while it runs another batch, after {micro_batches} of its micro-batches "
        "(inside of its own loss_fn, or from another thread). Both would add to one .grad, and neither update would be "
        "its batch's. For a gradient inside of a loss use torch.autograd.grad; for another batch call the step after "
        "this one, or make a step of another model for it."
    )


def tell_lost(micro_batches: int, samples: int, *, is_outside: bool = False) -> None:
    """Warns that a half window was discarded; ``is_outside`` where no pass had begun it."""
    counted = f" ({samples} samples)" if samples else ""
    message = (
        f"{micro_batches} micro-batches{counted} were accumulated and never applied: their window was left before it "
        "was complete. Their gradients were discarded."
    )
    if is_outside:
        message += (
            " Take micro-batches from accumulator.over(loader), which knows the last one, or call accumulator.flush() "
            "after the loop."
        )
    if sys.exc_info()[0] is None:
        warnings.warn(message, DiscardedWindowWarning, stacklevel=user_stack_level())
    else:  # an error is being handled, and a warning turned into an error would take its place
        logger.warning(message)


_MAX_CLASSES = 32


@dataclass(frozen=True, slots=True)
class _Watched:
    """One object for a time."""

    original: type
    derived: type
    checks: list[Callable[[], None]]


_WATCHED: dict[tuple[int, str], _Watched] = {}
"""By the object's id and the method's name. An attribute of the object would be saved with a scheduler's state."""


@contextmanager
def checked_before(owner: Any, name: str, check: Callable[[], None]) -> Iterator[None]:
    """Runs ``check`` before each call of a method of one object; leaves the object as it was.

    Objects that cannot be of another class (one with ``__slots__``, say), or whose method is an attribute of their own,
    are not watched. Several may watch one object, and end in any order.
    """
    key = id(owner), name
    watched = _WATCHED.get(key)
    try:
        if watched is None and hasattr(type(owner), name):
            with suppress(TypeError):  # an object that cannot be of another class
                watched = _Watched(type(owner), _derived(type(owner), name), [])
                owner.__class__ = watched.derived
                _WATCHED[key] = watched
        if watched is not None:
            watched.checks.append(check)
        yield
    finally:
        if watched is not None and check in watched.checks:
            watched.checks.remove(check)
        if watched is not None and not watched.checks:
            _WATCHED.pop(key, None)
            if type(owner) is watched.derived:
                owner.__class__ = watched.original


@functools.lru_cache(_MAX_CLASSES)
def _derived(original: type, name: str) -> type:
    """A class like ``original``, one method of which runs the checks of its object first."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched = _WATCHED.get((id(self), name))  # None where somebody wrapped the method meanwhile and has kept it
        if watched is not None:
            for check in watched.checks:
                check()
        return getattr(original, name)(self, *args, **kwargs)  # as it is by now: classes get patched

    def reduced(self: Any, protocol: Any) -> Any:  # what is pickled meanwhile is of the class that can be found again
        reduce: Any = original.__reduce_ex__
        made, arguments, *rest = reduce(self, 1)  # higher ones compare the classes
        return (made, tuple(original if argument is derived else argument for argument in arguments), *rest)

    members = {name: functools.wraps(getattr(original, name))(checked), "__reduce_ex__": reduced}
    derived: Any = type(original.__name__, (original,), members)
    derived.__module__, derived.__qualname__ = original.__module__, original.__qualname__
    return derived
