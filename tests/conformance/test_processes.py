"""Adapters in two processes: what they are given there, how they are found again, and how each can fail."""

import importlib.util
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradaccum.conformance import Trainer, judge, scenario
from gradaccum.conformance.adapters import loops
from gradaccum.conformance.oracle import EXACT
from gradaccum.conformance.processes import Place, place_of
from gradaccum.conformance.scenarios import BATCH, MICRO_BATCH
from gradaccum.conformance.verdicts import KNOWN, is_installed, known
from ranks import SRC

CASE = scenario("two processes, uneven shares")
IGNORED = -100


def mine(function: Any) -> Trainer:
    return Trainer(title="mine", function=function, imports=("from mine import train",))


def num_tokens(rank: int) -> int:
    return sum(int((labels != IGNORED).sum()) for _, labels in CASE.loader(MICRO_BATCH, rank=rank))


def test_the_shares_make_up_the_batches_and_are_uneven() -> None:
    of_both = [list(CASE.loader(BATCH, rank=rank)) for rank in range(2)]
    for whole, first, second in zip(CASE.loader(CASE.batch), *of_both, strict=True):
        assert all(torch.equal(part, torch.cat(own)) for part, *own in zip(whole, first, second, strict=True))
    assert len(CASE.loader(MICRO_BATCH, rank=0)) == len(CASE.loader(MICRO_BATCH, rank=1))
    assert num_tokens(0) > 2 * num_tokens(1)


# ------------------------------------------------------------------------------------------------------ what comes out
@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("accumulator", "train_step")])
def test_known_trainers(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"{KNOWN[name].package} is not installed")
    verdict = judge(CASE, known(name))
    assert verdict.outcome == ("exact" if name.startswith("exact_") else "off"), verdict
    if verdict.outcome == "off":
        assert verdict.error is not None
        assert verdict.error > 0.01
        assert "divided by the number of micro-batches in a full window" in str(verdict)


def right_for_its_share(
    model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int, processes: int
) -> Any:
    parallel = DistributedDataParallel(model)
    window: list[Any] = []
    for _ in range(epochs):
        for batch in batches:
            window.append(batch)
            if len(window) == micro_batches:
                loss(parallel, tuple(map(torch.cat, zip(*window, strict=True)))).backward()
                optimizer.step()
                optimizer.zero_grad()
                window.clear()
    return model.parameters(), None


def unwrapped(
    model: Any, optimizer: Any, loss: Any, batches: Any, *, micro_batches: int, epochs: int, processes: int
) -> Any:
    assert (dist.get_world_size(), dist.get_backend(), processes, micro_batches) == (2, "gloo", 2, 4)
    assert dist.get_rank() == int(os.environ["RANK"]) == int(os.environ["LOCAL_RANK"])
    assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "2"
    return loops.textbook(model, optimizer, loss, batches, micro_batches=micro_batches, epochs=epochs)


def idle(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
    return model.parameters(), None


def second_fails(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
    if dist.get_rank() == 1:
        raise KeyError("no such device. And more")
    dist.barrier()


def second_ends(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
    if dist.get_rank() == 1:
        print("out of luck", flush=True)
        os._exit(3)
    return model.parameters(), None


def refuses(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
    raise NotImplementedError("one process only")


def sleeps(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
    time.sleep(600)


@pytest.mark.parametrize(
    ("adapter", "outcome", "words"),
    [
        (
            right_for_its_share,
            "off",
            "each process's loss is right for its own share, and the processes' losses are av",
        ),
        (unwrapped, "error", "DifferentParametersError: Process 1 has other parameters than process 0, "),
        (idle, "off", "What it does: no update was made."),
        (second_fails, "error", "KeyError: 'no such device."),
        (second_ends, "error", "ended with status 3 before the adapter had returned."),
        (refuses, "not offered", "not offered, one process only"),
    ],
)
def test_verdicts(adapter: Any, outcome: str, words: str) -> None:
    verdict = judge(CASE, mine(adapter))
    assert (verdict.outcome, words in str(verdict)) == (outcome, True), verdict
    assert bool(verdict.reproduction) == (outcome != "not offered")


def test_the_deadline() -> None:
    start = time.monotonic()
    verdict = judge(replace(CASE, seconds=2.0), mine(sleeps))
    assert "ProcessError: Of 2 processes 0 and 1 still ran after 2 s, and were killed." in str(verdict)
    assert time.monotonic() - start < 60


def test_what_is_not_offered() -> None:
    def local(model: Any, *_: Any, micro_batches: int, epochs: int, processes: int) -> Any:
        raise AssertionError

    def alone(model: Any, *_: Any, micro_batches: int, epochs: int) -> Any:
        raise AssertionError

    assert "not offered, local cannot be imported by another process; write" in str(judge(CASE, mine(local)))
    assert "not offered, the adapter has no parameter processes" in str(judge(CASE, mine(alone)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert "not offered, a process group is initialised here" in str(judge(CASE, known("textbook")))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ how it is found again
def made() -> Callable[..., Any]:
    def inner() -> None:
        pass

    return inner


MADE = made()


def test_a_place_leads_to_the_function() -> None:
    place = place_of(loops.textbook)
    assert place == Place(module="gradaccum.conformance.adapters.loops", file=loops.__file__, name="textbook")
    assert place is not None
    assert place.load() is loops.textbook
    assert place_of(MADE) == Place(module=__name__, file=__file__, name="MADE")
    again = runpy.run_path(loops.__file__, run_name=loops.__name__)["textbook"]  # the same lines, run twice
    assert again is not loops.textbook
    assert place_of(again) == place
    assert place_of(made()) is None
    assert place_of(lambda: None) is None
    assert place_of(3) is None


def test_a_file_that_is_in_no_module_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "ranks.py"  # a module of this name is there, and is another
    path.write_text("def train():\n    return 7\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ranks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for function in (module.train, runpy.run_path(str(path))["train"]):
        place = place_of(function)
        assert place is not None
        assert (place.file, place.load()()) == (str(path), 7)


SCRIPT = """
from gradaccum import conformance
from gradaccum.conformance.adapters.loops import textbook

def train(*given, micro_batches, epochs, processes):
    return textbook(*given, micro_batches=micro_batches, epochs=epochs, processes=processes)

if {guard}:
    case = conformance.scenario("two processes, uneven shares")
    print(conformance.error_of(case, case.train(train)))
"""


def run(path: Path, script: str) -> "subprocess.CompletedProcess[str]":
    path.write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)


def test_the_reproduction_as_a_script_prints_the_error(tmp_path: Path) -> None:
    verdict = judge(CASE, known("textbook"))
    assert len(verdict.reproduction) == 5
    done = run(tmp_path / "five_lines.py", "\n".join(verdict.reproduction))
    assert float(done.stdout) == pytest.approx(verdict.error, rel=1e-6), done.stderr


def test_an_adapter_in_the_script_itself(tmp_path: Path) -> None:
    done = run(tmp_path / "script.py", SCRIPT.format(guard='__name__ == "__main__"'))
    assert float(done.stdout) > EXACT, done.stderr
    done = run(tmp_path / "script.py", SCRIPT.format(guard="True"))
    assert done.returncode == 1
    assert 'script that trains belongs under if __name__ == "__main__":' in done.stderr
