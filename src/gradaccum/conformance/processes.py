"""A function in several processes of their own, in a gloo process group that is initialised; all have one deadline.

Each is a new Python that imports the function again, so nothing that this process has set up goes with it but the
environment and `sys.path`. (`multiprocessing` would also run the script again that was started, which a script of five
lines does not expect.) A `Place` says where a function of the user's is found again.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import inspect
import operator
import os
import pickle
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from gradaccum.errors import GradAccumError

SECONDS = 120.0
"""The deadline of all processes; importing a framework takes most of the few seconds that a scenario needs."""
_POLL_SECONDS = 0.01
_REAPED_SECONDS = 0.2  # between a process's connections being closed, at its end, and its status being there
_MOST_SHOWN = 300  # characters of what a process printed before it ended by itself


class ProcessError(GradAccumError, RuntimeError):
    """A process ended by itself, or was ended at the deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where another process finds a function: by its module's name, or by its file where no such module is installed.

    Attributes:
        name: in the module, with dots.
    """

    module: str
    file: str | None
    name: str

    def load(self) -> Any:
        """The function, in a process that may not have imported it yet."""
        get = operator.attrgetter(self.name)
        with suppress(ImportError, ValueError):  # what the module itself fails to import comes up below
            spec = importlib.util.find_spec(self.module)
            if self.module != "__main__" and spec is not None and spec.origin == self.file:
                return get(importlib.import_module(self.module))
        if self.file is None:
            return get(importlib.import_module(self.module))
        return get(SimpleNamespace(**runpy.run_path(self.file)))


def place_of(function: Any) -> Place | None:
    """Where a function is found again, or None: it was made inside another one, or typed at a prompt."""
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", "")
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    source = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    if loaded is None or (source is not None and source != file and not _leads_to(loaded, name, function)):
        file = source  # it was run from its file, by runpy or by the command line, and is in no module
        name = name if name.isidentifier() and file is not None else ""
    elif not _leads_to(loaded, name, function):
        name = next((key for key, value in vars(loaded).items() if value is function), "")
    if not name or (file is None and module == "__main__") or (file is not None and not Path(file).is_file()):
        return None
    return Place(module=module, file=None if file is None else str(Path(file).absolute()), name=name)


def run_processes(function: Callable[..., Any], *arguments: Any, processes: int, seconds: float = SECONDS) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process, by rank.

    Args:
        function: at the top of a module that can be imported.
        *arguments: what else it is given; pickled, as the function is.
        processes: how many.
        seconds: after which all that still run are killed.

    Raises:
        ProcessError: one ended without a result, or at the deadline.
        Exception: what the function raised in the process that failed first; the others are killed.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        started = [_start(folder, rank, processes, seconds) for rank in range(processes)]
        try:
            _wait(folder, started, time.monotonic() + seconds, seconds)
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.wait()
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(processes)]


def become_rank(folder: str, rank: int, processes: int, seconds: float) -> None:
    """What a started process does: its part of the call, and then it ends."""
    try:
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=processes, timeout=datetime.timedelta(seconds=seconds)
        )
        function, arguments = pickle.loads(Path(folder, "call").read_bytes())
        _write(Path(folder, str(rank)), function(rank, *arguments))
        if dist.is_initialized():
            dist.barrier()  # a process that ends takes its connections with it, and others may still read from them
    except Exception as error:  # noqa: BLE001 - an adapter may raise anything, and it is raised again over there
        _write(Path(folder, f"{rank}.error"), (_portable(error), traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # torch's own threads have been seen to abort a process while Python was ending


def _leads_to(module: Any, name: str, function: Any) -> bool:
    """Whether a module has the function under this name, or the same lines: a file may have been run twice."""
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        return False
    code = getattr(function, "__code__", None)
    is_same_code = code is not None and code == getattr(found, "__code__", None)
    return found is function or (is_same_code and function.__closure__ is None)


def _start(folder: Path, rank: int, processes: int, seconds: float) -> subprocess.Popen[bytes]:
    """With the variables that torchrun sets, but for the address: trainers read them even in an initialised group."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **{name: str(value) for name, value in variables.items()}}
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import become_rank; "
        f"become_rank({str(folder)!r}, {rank}, {processes}, {seconds})"
    )
    with (folder / f"{rank}.output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _wait(folder: Path, started: list[subprocess.Popen[bytes]], deadline: float, seconds: float) -> None:
    while True:
        running = [rank for rank, process in enumerate(started) if process.poll() is None]
        _raise_first_failure(folder, started)
        if not running:
            return
        if time.monotonic() > deadline:
            raise ProcessError(
                f"Of {len(started)} processes {' and '.join(map(str, running))} still ran after {seconds:g} s, and "
                "were killed. A process that makes more updates than another, or other collectives, waits for ever; so "
                "does one that starts processes of its own."
            )
        time.sleep(_POLL_SECONDS)


def _raise_first_failure(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """The first, because the others fail for it: their connection is closed."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        time.sleep(_REAPED_SECONDS)
    for rank, process in enumerate(started):
        if process.poll() is not None and not any((folder / name).exists() for name in (f"{rank}", f"{rank}.error")):
            printed = (folder / f"{rank}.output").read_text(encoding="utf-8", errors="replace").strip()
            raise ProcessError(
                f"Process {rank} ended with status {process.returncode} before the adapter had returned. The last that "
                f"it printed: {printed[-_MOST_SHOWN:] or 'nothing'}"
            )
    if errors:
        error, text = pickle.loads(errors[0].read_bytes())
        raise error from ProcessError(f"in process {errors[0].stem}:\n{text}")


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(value))
    part.rename(path)


def _portable(error: Exception) -> Exception:
    """The error, or one with the same text where its class cannot be found in another process."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # noqa: BLE001 - a class of anybody's
        pass
    return ProcessError(f"{type(error).__name__}: {error}")
