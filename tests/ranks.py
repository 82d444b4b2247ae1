"""Real processes for tests: started, given a deadline, and ended by whoever started them.

A case is a function of a module under ``tests/``, called on every rank as ``case(rank, world_size, *arguments)`` with a
gloo process group. What it returns comes back by rank. Python starts once for each rank and imports torch, which takes
seconds; so tests run several checks in one case.
"""

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src"
SECONDS = 100.0
"""A case's deadline. On an idle machine each takes less than ten."""
GROUP_SECONDS = 30.0
"""The process group's own timeout, which must end before the case's."""

_CHILD = """
import importlib.util, os, pickle, sys, datetime
import torch, torch.distributed as dist
torch.set_num_threads(1)
folder, rank, world_size, group_seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with open(os.path.join(folder, "case"), "rb") as file:
    path, name, arguments = pickle.load(file)
spec = importlib.util.spec_from_file_location("case_module", path)
module = importlib.util.module_from_spec(spec)
sys.modules["case_module"] = module
spec.loader.exec_module(module)
dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "store"), world_size), rank=rank,
                        world_size=world_size, timeout=datetime.timedelta(seconds=group_seconds))
torch.manual_seed(0)
result = getattr(module, name)(rank, world_size, *arguments)
with open(os.path.join(folder, f"{rank}.part"), "wb") as file:
    pickle.dump(result, file)
os.rename(os.path.join(folder, f"{rank}.part"), os.path.join(folder, f"{rank}"))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)  # everything is told: torch's own threads have been seen to abort a process while Python was ending
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank ended: its exit status, what it printed to stderr, and what the case returned, if it did."""

    status: int
    stderr: str
    result: Any


def run_ranks(
    case: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    seconds: float = SECONDS,
    group_seconds: float = GROUP_SECONDS,
    while_running: Callable[[list[subprocess.Popen[bytes]]], None] | None = None,
) -> list[Ended]:
    """Runs a case on several ranks, however they end.

    Args:
        case: a function at the top of a module.
        world_size: how many ranks.
        arguments: for the case.
        seconds: after which the ranks that still run are killed, and the test fails.
        group_seconds: timeout of the process group.
        while_running: is given the processes once they have been started.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "case").open("wb") as file:
        pickle.dump((sys.modules[case.__module__].__file__, case.__name__, arguments), file)
        file.flush()
        environment = {"PYTHONPATH": f"{SRC}:{TESTS}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        outputs = [Path(folder) / f"{rank}.stderr" for rank in range(world_size)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, output in enumerate(outputs):
                command = [sys.executable, "-c", _CHILD, folder, str(rank), str(world_size), str(group_seconds)]
                with output.open("wb") as stderr:
                    processes.append(subprocess.Popen(command, env=environment, stderr=stderr))
            if while_running is not None:
                while_running(processes)
            end = time.monotonic() + seconds
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            told = "\n".join(f"rank {rank}: {output.read_text()[-3000:]}" for rank, output in enumerate(outputs))
            raise AssertionError(f"some of {world_size} ranks still ran after {seconds} s\n{told}") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        ended: list[Ended] = []
        for rank, process in enumerate(processes):
            result = Path(folder) / str(rank)
            ended.append(
                Ended(
                    status=process.returncode,
                    stderr=outputs[rank].read_text(),
                    result=pickle.loads(result.read_bytes()) if result.exists() else None,
                )
            )
        return ended


def results_of(case: Callable[..., Any], world_size: int, *arguments: Any, **options: Any) -> list[Any]:
    """What a case returned on each rank; a rank that failed fails the test with its traceback."""
    ended = run_ranks(case, world_size, *arguments, **options)
    failed = [f"rank {rank}:\n{one.stderr}" for rank, one in enumerate(ended) if one.status]
    assert not failed, "\n".join(failed)
    return [one.result for one in ended]
