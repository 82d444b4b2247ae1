"""A process that has imported torch once, and forks the ranks of tests from it: they start in milliseconds.

Importing torch, its optimizers' compiler and FSDP2 takes a rank four seconds of a core, which is most of what a test of
processes took. One server runs for each process of the tests. A request is a line of JSON on its standard input, the
answer a line with the rank's pid; when a rank has ended, its status is written to ``<rank>.status`` in its folder.
"""

import atexit
import datetime
import importlib.util
import json
import os
import pickle
import select
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

POLL_SECONDS = 0.02
IMPORTED = (
    "gradaccum.fit.planner",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)


def serve() -> None:
    """Answers requests until the standard input ends; then no rank is left behind."""
    _import_all()
    folders: dict[int, Path] = {}
    while True:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            request = sys.stdin.readline()
            if not request:
                break
            asked = json.loads(request)
            pid = os.fork()
            if not pid:
                _become_rank(**asked)
            folders[pid] = Path(asked["folder"]) / f"{asked['rank']}.status"
            print(pid, flush=True)
        while folders:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            part = folders[pid].with_suffix(".part")
            if part.parent.exists():
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                part.rename(folders.pop(pid))
            else:
                folders.pop(pid)
    for pid in folders:
        os.kill(pid, signal.SIGKILL)


def _import_all() -> None:
    """What ranks import sooner or later; nothing of it starts a thread."""
    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def _become_rank(*, folder: str, rank: int, world_size: int, group_seconds: float) -> None:
    """Runs a case as one rank, and ends the process."""
    status = 1
    output = os.open(f"{folder}/{rank}.stderr", os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        _run_case(Path(folder), rank, world_size, group_seconds)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        atexit._run_exitfuncs()
    except BaseException as error:  # noqa: BLE001 - as a script ends that raises
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # all is told: torch's own threads have been seen to abort a process while Python was ending


def _run_case(folder: Path, rank: int, world_size: int, group_seconds: float) -> None:
    path, name, arguments = pickle.loads((folder / "case").read_bytes())
    spec = importlib.util.spec_from_file_location("case_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["case_module"] = module
    spec.loader.exec_module(module)
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = datetime.timedelta(seconds=group_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    torch.manual_seed(0)
    result: Any = getattr(module, name)(rank, world_size, *arguments)
    part = folder / f"{rank}.result"
    part.write_bytes(pickle.dumps(result))
    part.rename(folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    serve()
