"""The optimizer's state to come is reckoned with while the first sizes are tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradaccum
from gradaccum.fit.transaction import _state_reserved
from gradaccum.memory.live_bytes import LiveBytes

pytest.importorskip("resource", reason="this system cannot cap a process's address space")

SCRIPT = """
import json, resource, sys
import torch
from torch import nn
import gradaccum as ga
from gradaccum.fit import transaction

torch.set_num_threads(1)
torch.manual_seed(0)
# 2,048 x 2,048 fp32 weights: 16 MiB, as much again for the gradient, and 32 MiB for Adam's state.
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
with open("/proc/self/status") as status:
    mapped = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (mapped + (150 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
failed = []
is_out_of_memory = transaction.is_out_of_memory
def seen(error):
    failed.append(len(updates))
    return is_out_of_memory(error)
transaction.is_out_of_memory = seen
updates = []
step = ga.TrainStep(model, optimizer, loss_fn)
for _ in range(6):
    updates.append(step(batch).micro_batch_size)
print(json.dumps({"failed": failed, "sizes": updates}))
"""


def test_a_size_that_fits_the_first_update_fits_the_next_ones() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gradaccum.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(64 << 10),  # what is freed goes back, and does not stay in the heap
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made["failed"]) == {0}, "sizes failed at other updates than the first"
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
    monkeypatch.setattr("gradaccum.fit.transaction._occupied", pytest.fail)
    with _state_reserved([torch.optim.Adam(nn.Linear(3, 3).parameters())], torch.device("cpu")):
        pass
