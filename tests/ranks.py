"""Real processes for tests: started, given a deadline, and ended by whoever started them.

A case is a function of a module under ``tests/``, called on every rank as ``case(rank, world_size, *arguments)`` with a
gloo process group. What it returns comes back by rank. Ranks are forked from one process that has imported torch
(`rank_server`).
"""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src"
SECONDS = 300.0
"""A case's deadline. On an idle machine each takes less than ten; many busy processes on two cores take their time."""
GROUP_SECONDS = 100.0
"""The process group's own timeout: longer than one rank may import while another waits, and shorter than the case's."""
POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank ended: its exit status, what it printed, and what the case returned, if it did."""

    status: int
    stderr: str
    result: Any


def run_ranks(
    case: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    seconds: float = SECONDS,
    group_seconds: float = GROUP_SECONDS,
) -> list[Ended]:
    """Runs a case on several ranks, however they end.

    Args:
        case: a function at the top of a module.
        world_size: how many ranks.
        arguments: for the case.
        seconds: after which the ranks that still run are killed, and the test fails.
        group_seconds: timeout of the process group.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case").write_bytes(pickle.dumps((sys.modules[case.__module__].__file__, case.__name__, arguments)))
        pids = {rank: _start(folder, rank, world_size, group_seconds) for rank in range(world_size)}
        end = time.monotonic() + seconds
        try:
            while (running := _running(folder, pids)) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        finally:
            for rank in _running(folder, pids):
                with suppress(ProcessLookupError):
                    os.kill(pids[rank], signal.SIGKILL)
            while _running(folder, pids):
                time.sleep(POLL_SECONDS)
        printed = [(folder / f"{rank}.stderr").read_text() for rank in pids]
        if running:
            told = "\n".join(f"rank {rank}: {text[-3000:]}" for rank, text in enumerate(printed))
            raise AssertionError(f"some of {world_size} ranks still ran after {seconds} s\n{told}")
        return [
            Ended(
                status=int((folder / f"{rank}.status").read_text()),
                stderr=printed[rank],
                result=pickle.loads((folder / str(rank)).read_bytes()) if (folder / str(rank)).exists() else None,
            )
            for rank in pids
        ]


def results_of(case: Callable[..., Any], world_size: int, *arguments: Any, **options: Any) -> list[Any]:
    """What a case returned on each rank; a rank that failed fails the test with its traceback."""
    ended = run_ranks(case, world_size, *arguments, **options)
    failed = [f"rank {rank}:\n{one.stderr}" for rank, one in enumerate(ended) if one.status]
    assert not failed, "\n".join(failed)
    return [one.result for one in ended]


def _running(folder: Path, pids: dict[int, int]) -> list[int]:
    return [rank for rank in pids if not (folder / f"{rank}.status").exists()]


def _start(folder: Path, rank: int, world_size: int, group_seconds: float) -> int:
    """Starts one rank; its process id."""
    (folder / f"{rank}.stderr").touch()
    asked = {"folder": str(folder), "rank": rank, "world_size": world_size, "group_seconds": group_seconds}
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """This process's server; it ends when its standard input does."""
    environment = {"PYTHONPATH": f"{SRC}:{TESTS}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(TESTS / "rank_server.py")]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
