"""What a command works on: a function of the user's, named on the command line, that returns a `Job`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gradaccum.errors import GradAccumError
from gradaccum.types import Job

_MOST_SHOWN = 8


class TargetError(GradAccumError, ValueError):
    """The target on the command line does not lead to a job."""


def load_job(target: str) -> Job:
    """Loads the function that a target names, and calls it.

    Raises:
        TargetError: there is no such file, module or function, or it returns something else than a job.
    """
    function = load_function(target, is_to="takes no arguments and returns ga.Job(model, loss_fn, batch)")
    _check_takes_nothing(function, target)
    job = function()
    if not isinstance(job, Job):
        raise TargetError(
            f"{target} returned {type(job).__name__}, and has to return a job: ga.Job(model, loss_fn, batch, "
            "optimizer=...)."
        )
    return job


def load_function(target: str, *, is_to: str) -> Callable[..., Any]:
    """Imports the module of ``path/to/file.py:function`` or ``package.module:function`` and takes the function.

    A file finds what lies beside it, a module what lies in the working directory. What the user's own code raises
    passes through, with its traceback.

    Args:
        target: on the command line.
        is_to: what the function is to do, after "the function".

    Raises:
        TargetError: there is no such file, module or function.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise TargetError(
            f"{target!r} does not name a function. Write path/to/file.py:function or package.module:function; the "
            f"function {is_to}."
        )
    path = Path(place).absolute()
    is_file = place.endswith(".py")
    folder = str(path.parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _file(path) if is_file else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [key for key, value in functions if value.__module__ == module.__name__]
        there = f"It has {', '.join(own[:_MOST_SHOWN])}." if own else "It has no functions."
        raise TargetError(f"{place} has no function {name!r}. {there}")
    return function


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"There is no file {path}. The part of the target before the last colon is its path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "the suffix .py has a loader"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickle look modules up by their name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    finally:
        if before is not None:  # a file may be called like a module that everybody uses
            sys.modules[path.stem] = before
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the user's module imports
        raise TargetError(
            f"There is no module {error.name!r}, neither installed nor in {Path.cwd()}. For a file write its path with "
            f".py: {name.replace('.', '/')}.py:function"
        ) from error


def _check_takes_nothing(function: Callable[..., Any], target: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TargetError(
            f"{target} cannot be called without arguments ({error}), which is all that a command line can do. "
            "Give its parameters defaults."
        ) from error
