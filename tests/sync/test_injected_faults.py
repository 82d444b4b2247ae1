"""Thirty jobs of two processes in which one raises at a random place: all end, or all go on, with one cause named.

Each job is two processes of its own, forked from one that has imported everything, since importing torch takes longer
than a job. An error ends the script, as it does by default, or is caught, and the script goes on with the next batch.
"""

from __future__ import annotations

import datetime
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gradaccum as ga
from ranks import SRC, TESTS
from wrapping import full_tensor, wrapped

SEEDS = 30
UPDATES = 5
ROWS = 7
DEADLINE = 60.0  # of one job, which takes half a second on an idle machine
GROUP_SECONDS = 40.0
MOST_ERRORS = 4  # after which a script that catches errors gives up
PLACES = ("loader", "loss_fn", "weights", "backward", "optimizer", "scheduler", "save", "body")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes wrong in one job, made of its seed."""

    seed: int
    place: str
    way: str  # of training: "TrainStep", "over", "windows"
    wrap: str
    rank: int  # which raises
    update: int  # in which it raises
    catches: bool  # whether the scripts go on after an error

    @staticmethod
    def of(seed: int) -> Plan:
        chance = random.Random(seed)
        place = PLACES[seed % len(PLACES)]
        wrap = chance.choice(("plain", "DDP", "FSDP2"))
        # Under FSDP2 who raises inside of a forward or backward leaves the others in a collective, until it ends.
        may_catch = wrap != "FSDP2" or place in ("optimizer", "scheduler", "save")
        return Plan(
            seed=seed,
            place=place,
            way=chance.choice(("TrainStep", "over", "windows")),
            wrap=wrap,
            rank=chance.randrange(2),
            update=chance.randint(2, 4),
            catches=may_catch and chance.random() < 0.6,
        )


class Injected(ValueError):
    pass


class Fault:
    """Raises once, in one update of one process."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan, self._is_here = plan, rank == plan.rank
        self.trains: Any = None

    def at(self, place: str, *, done: int = 0) -> None:
        """Called at a place, with as many updates done since the one that is meant began."""
        if self._is_here and place == self._plan.place and self.trains.updates - done == self._plan.update - 1:
            self._is_here = False
            raise Injected(f"injected in the {place}")

    def is_due(self, place: str) -> bool:
        return self._is_here and place == self._plan.place and self.trains.updates == self._plan.update - 1


class Optimizer(torch.optim.SGD):
    fault: Fault

    def step(self, closure: Any = None) -> Any:
        self.fault.at("optimizer")
        return super().step(closure)


class Scheduler(torch.optim.lr_scheduler.StepLR):
    fault: Fault | None = None

    def step(self, *args: Any) -> None:
        if self.fault is not None:
            self.fault.at("scheduler")
        super().step(*args)


class History:
    """Saved beside the model; on one process it cannot be, once."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def state_dict(self) -> dict[str, Any]:
        self._fault.at("save", done=1)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Job:
    """The script of one process."""

    def __init__(self, plan: Plan, rank: int, folder: Path) -> None:
        self._plan, self._rank = plan, rank
        self._fault = fault = Fault(plan, rank)
        torch.manual_seed(0)
        self._plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        model: Any = fully_shard(self._plain) if plan.wrap == "FSDP2" else wrapped(self._plain, plan.wrap)
        self._model: nn.Module = model
        optimizer = Optimizer(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = Scheduler(optimizer, 2)
        optimizer.fault = scheduler.fault = fault
        options: dict[str, Any] = {"scheduler": scheduler, "weights": self._weight}
        objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "history": History(fault)}
        self._trains: Any
        if plan.way == "TrainStep":
            self._trains = objects["train_step"] = ga.TrainStep(
                model, optimizer, self._loss, micro_batch_size=3, **options
            )
        else:
            self._trains = objects["accumulator"] = ga.Accumulator(model, optimizer, micro_batches=2, **options)
        fault.trains = self._trains
        self._checkpoint = ga.Checkpoint(folder / "checkpoints", **objects)
        self._record = folder / f"{rank}.json"
        self._errors: list[str] = []

    def run(self) -> None:
        """Trains; an error that is not caught, or one too many, ends it."""
        done = False
        try:
            while self._trains.updates < UPDATES:
                try:
                    self._epoch()
                except Exception as error:
                    self._errors.append(f"{type(error).__name__}: {error}")
                    if not self._plan.catches or len(self._errors) == MOST_ERRORS:
                        raise
            done = True
        finally:
            weights = [] if not done else [full_tensor(one).tolist() for one in self._plain.parameters()]
            found = {"done": done, "updates": self._trains.updates, "errors": self._errors, "weights": weights}
            self._record.write_text(json.dumps(found))

    def _epoch(self) -> None:
        if self._plan.way == "TrainStep":
            for x in self._loader():
                self._trains(x)
                if self._ends_after_its_body():
                    return
        elif self._plan.way == "windows":
            for window in self._trains.windows(self._loader()):
                for x in window:
                    self._trains.backward(self._loss(self._model, x))
                if self._ends_after_its_body():
                    return
        else:
            for x in self._trains.over(self._loader()):
                if self._trains.backward(self._loss(self._model, x)) and self._ends_after_its_body():
                    return

    def _loader(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(97 * self._rank + self._trains.updates)
        for _ in range(2 * UPDATES):
            self._fault.at("loader")
            yield torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)

    def _loss(self, model: nn.Module, x: Tensor) -> Tensor:
        self._fault.at("loss_fn")
        loss = model(x).square().mean()
        if self._fault.is_due("backward"):
            loss.register_hook(lambda _: self._fault.at("backward"))
        return loss

    def _weight(self, x: Tensor) -> int:
        self._fault.at("weights")
        return len(x)

    def _ends_after_its_body(self) -> bool:
        self._fault.at("body", done=1)
        self._checkpoint.save()
        return self._trains.updates >= UPDATES


def job(seed: int, rank: int, folder: Path) -> None:
    """One process of a job, as a script of its own would run it."""
    store = dist.FileStore(str(folder / "store"), 2)
    timeout = datetime.timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    Job(Plan.of(seed), rank, folder).run()
    dist.destroy_process_group()


# Forks the processes of one job after another, and waits for them. What a child raises ends it as it would a script:
# it is printed, and what was to be run at the exit is. Only the memory is not taken down, which takes a second.
_PARENT = """
import atexit, os, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_injected_faults as module
import gradaccum.checking.first_check, gradaccum.checkpoint.sharded, torch._dynamo
folder, seeds, deadline = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
for seed in range(seeds):
    (folder / str(seed)).mkdir()
    children = {{}}
    for rank in range(2):
        child = os.fork()
        if not child:
            os.dup2(os.open(folder / str(seed) / f"{{rank}}.stderr", os.O_WRONLY | os.O_CREAT), 2)
            try:
                module.job(seed, rank, folder / str(seed))
            except BaseException as error:
                sys.last_value = error
                traceback.print_exc()
            atexit._run_exitfuncs()
            os._exit(hasattr(sys, "last_value"))
        children[child] = rank
    end = time.monotonic() + deadline
    while children:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            children.pop(ended)
        elif time.monotonic() > end:
            (folder / str(seed) / "late").write_text(f"ranks {{sorted(children.values())}}")
            for child in children:
                os.kill(child, 9)
            end += deadline
        else:
            time.sleep(0.01)
"""


def what_is_wrong(plan: Plan, folder: Path) -> Iterator[str]:
    """What one job should not have been."""
    if (folder / "late").exists():
        yield f"{(folder / 'late').read_text()} still ran after {DEADLINE} s"
    records = [folder / f"{rank}.json" for rank in range(2)]
    if not all(record.exists() for record in records):
        yield f"no word of {[rank for rank in range(2) if not records[rank].exists()]}"
        return
    ends = [json.loads(record.read_text()) for record in records]
    failed, other = ends[plan.rank], ends[1 - plan.rank]
    what = f"injected in the {plan.place}"
    if not failed["errors"] or what not in failed["errors"][0]:
        yield "it was not injected"
    if failed["done"] != other["done"]:
        yield "one went on, and the other did not"
    elif failed["done"] and (failed["weights"] != other["weights"] or failed["updates"] != other["updates"]):
        yield "they went on with different weights"
    if other["done"] and not plan.catches:
        yield "the other one did not hear of it"
    # A forward of the user's own that waits inside of FSDP2 ends with the transport's words, and its process with it.
    is_out_of_reach = plan.wrap == "FSDP2" and plan.way != "TrainStep" and plan.place in ("loss_fn", "backward")
    for error in [] if is_out_of_reach else other["errors"]:
        is_named = what in error and f"rank {plan.rank}" in error
        is_of_both = "RankError: The processes are at different places" in error and error in failed["errors"]
        if not (is_named or (plan.catches and is_of_both)):
            yield "the other one was not told of the cause"


def test_all_end_or_go_on_together(tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": f"{SRC}:{TESTS}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    command = [sys.executable, "-c", _PARENT.format(), str(tmp_path), str(SEEDS), str(DEADLINE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SEEDS * DEADLINE, env=environment)
    assert done.returncode == 0, done.stderr
    wrong: list[str] = []
    went_on = 0
    for plan in map(Plan.of, range(SEEDS)):
        folder = tmp_path / str(plan.seed)
        found = list(what_is_wrong(plan, folder))
        if found:
            said = {path.name: path.read_text()[-1500:] for path in sorted(folder.glob("*.*")) if path.is_file()}
            wrong.append(f"{asdict(plan)}: {'; '.join(found)}\n" + "\n".join(f"{k}: {v}" for k, v in said.items()))
        else:
            went_on += json.loads((folder / "0.json").read_text())["done"]
    assert not wrong, f"{len(wrong)} of {SEEDS} jobs\n\n" + "\n\n".join(wrong)
    assert 5 < went_on < SEEDS - 5, "some end and some go on"
