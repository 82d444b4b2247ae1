"""Ranges by stage in a profile of torch's: ``gradaccum.forward``, ``.backward``, ``.reduce``, ``.step``.

Only while a profiler runs, which takes 0.3 us to ask, so that nobody pays for ranges that nobody looks at.

    forward    from a micro-batch to its loss or outputs, where the library calls it in the thread of training: not in a
               loop of the user's, and not in lockstep
    backward   one micro-batch's
    reduce     messages between processes, and the sum of their gradients: who waits here waits for another one
    step       finite? clip, step, schedule
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

Runs = TypeVar("Runs")
_NOTHING = nullcontext()


def stage(name: str) -> AbstractContextManager[Any]:
    """Context manager for one stage."""
    return record_function(f"gradaccum.{name}") if is_profiled() else _NOTHING


def is_profiled() -> bool:
    """Whether a profiler runs."""
    return torch.autograd._profiler_enabled()


def in_stage(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a range around each call."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"gradaccum.{name}"):
            return function(*args, **kwargs)

    return run


def with_forwards(runner: Runs) -> Runs:
    """The same runner of micro-batches with a range around each forward, where it has them one by one."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(runner) if dataclasses.is_dataclass(runner) else ():
        if field.name in ("loss_of", "output_of", "run_one"):
            changed[field.name] = in_stage("forward", getattr(runner, field.name))
        elif field.name in ("runner", "uncut"):
            changed[field.name] = with_forwards(getattr(runner, field.name))
    return dataclasses.replace(runner, **changed) if changed else runner  # type: ignore[type-var]
