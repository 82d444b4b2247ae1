"""Limits that are real: processes whose address space is capped, in which batches cannot run whole.

And the room that is kept for the optimizer's state to come while the first sizes are tried.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradaccum
from gradaccum.fit.transaction import _state_reserved
from gradaccum.memory.live_bytes import LiveBytes
from oracle import SINGLE

pytest.importorskip("resource", reason="this system cannot cap a process's address space")
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells a process's address space")

CAPPED = """
import json, resource
import torch
from torch import nn
import gradaccum as ga
from gradaccum.fit import transaction

torch.set_num_threads(1)
torch.manual_seed(0)
failed = []
is_out_of_memory = transaction.is_out_of_memory

def seen(error):
    failed.append(str(error))
    return is_out_of_memory(error)

def cap(room):
    with open("/proc/self/status") as status:
        mapped = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    transaction.is_out_of_memory = seen
"""

# 512 rows keep 8 activations of 16,384 fp32 numbers each: 256 MiB. The cap leaves 96 MiB above what is mapped when all
# else is there; what the libraries keep for themselves was made by then: the same was trained without a cap before.
ROWS = 512
MEAN_SQUARES = f"""
import copy

rows = {ROWS}
free = nn.Sequential(nn.Linear(16, 16384), *[nn.LeakyReLU(0.9) for _ in range(7)], nn.Linear(16384, 1))
capped = copy.deepcopy(free)
batches = [(torch.randn(rows, 16), torch.randn(rows, 1)) for _ in range(2)]

def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])

def trained(model, size):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=size)
    updates = [step(batch) for batch in batches]
    return [[update.micro_batch_size, update.samples, update.loss.item()] for update in updates]

made = dict(free=trained(free, rows))
cap(96 << 20)
try:
    loss_fn(capped, batches[0]).backward()
    made["whole batch"] = "fits"
except RuntimeError as error:
    made["whole batch"] = str(error)
capped.zero_grad()
made["capped"] = trained(capped, "auto")
made["failed"] = failed
made["relative difference"] = max(
    ((one - other).norm() / other.norm()).item()
    for one, other in zip(capped.parameters(), free.parameters(), strict=True)
)
print(json.dumps(made))
"""

# 2,048 x 2,048 fp32 weights: 16 MiB, as much again for the gradient, and 32 MiB for Adam's state.
STATE = """
model = nn.Sequential(nn.Linear(2048, 2048), *[nn.LeakyReLU(0.9) for _ in range(7)])
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

def loss_fn(model, batch):
    return model(batch).square().mean()

loss_fn(model, torch.randn(4, 2048)).backward()  # what libraries keep for themselves is there now
spare = nn.Linear(2, 2)
other = torch.optim.AdamW(spare.parameters())
loss_fn(spare, torch.randn(4, 2)).backward()
other.step()
optimizer.zero_grad()
batch = torch.randn(2048, 2048)  # 16 MiB for each activation, nine of them
cap(150 << 20)
step = ga.TrainStep(model, optimizer, loss_fn)
sizes, failures = [], []
for _ in range(6):
    sizes.append(step(batch).micro_batch_size)
    failures.append(len(failed))
print(json.dumps(dict(failures=failures, sizes=sizes)))
"""


def run(script: str) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gradaccum.__file__).parents[1]),
        # What malloc keeps for later is mapped too; large blocks with mappings of their own are given back.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CAPPED + script]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@LINUX
def test_a_batch_that_cannot_fit_is_trained_in_pieces_that_do() -> None:
    made = run(MEAN_SQUARES)
    assert "can't allocate memory" in made["whole batch"]
    assert made["failed"], "no allocation failed"
    sizes, samples, losses = zip(*made["capped"], strict=True)
    assert max(sizes) < ROWS
    assert samples == (ROWS, ROWS)
    assert [update[:2] for update in made["free"]] == [[ROWS, ROWS]] * 2
    assert losses == pytest.approx([loss for _, _, loss in made["free"]], rel=SINGLE)
    assert made["relative difference"] <= SINGLE


@LINUX
def test_a_size_that_fits_the_first_update_fits_the_next_ones() -> None:
    made = run(STATE)
    assert made["failures"][0] > 0
    assert len(set(made["failures"])) == 1, "sizes failed at other updates than the first"
    assert max(made["sizes"]) <= 1024


def test_as_much_is_held_as_the_state_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradaccum.fit.transaction._ends_in_an_error", lambda device: True)
    model = nn.Linear(1000, 100)
    optimizer = torch.optim.Adam(model.parameters())
    device = torch.device("cpu")
    with LiveBytes() as live:
        with _state_reserved([optimizer], device):
            held = live.current
        assert live.current == 0
    assert 2 * 4 * 100_100 <= held <= 2 * 4 * 100_100 + 64, "two moments, and two counts of steps"
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    with LiveBytes() as live, _state_reserved([optimizer], device):
        assert live.current == 0, "the state is there"


def test_more_than_there_is_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradaccum.fit.transaction._ends_in_an_error", lambda device: True)

    def refused(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimizer = torch.optim.Adam(nn.Linear(3, 3).parameters())
    monkeypatch.setattr(torch, "empty", refused)
    with _state_reserved([optimizer], torch.device("cpu")):
        pass


def test_where_memory_ends_in_no_error_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradaccum.memory.optimizer_memory.optimizer_memory", pytest.fail)
    with _state_reserved([torch.optim.Adam(nn.Linear(3, 3).parameters())], torch.device("cpu")):
        pass
