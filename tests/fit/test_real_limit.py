"""A limit that is real: a process whose address space is capped trains a batch that cannot fit whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradaccum
from oracle import SINGLE

pytest.importorskip("resource", reason="this system cannot cap a process's address space")

# 512 rows keep 8 activations of 16,384 fp32 numbers each: 256 MiB. The cap leaves 96 MiB above what is mapped when all
# else is there; what the libraries keep for themselves was made by then: the same was trained without a cap before.
ROWS = 512
ROOM_BYTES = 96 << 20

SCRIPT = """
import copy, json, resource, sys
import torch
from torch import nn
import gradaccum as ga
from gradaccum.fit import transaction

torch.set_num_threads(1)
rows, room = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
free = nn.Sequential(nn.Linear(16, 16384), *[nn.LeakyReLU(0.9) for _ in range(7)], nn.Linear(16384, 1))
capped = copy.deepcopy(free)
batches = [(torch.randn(rows, 16), torch.randn(rows, 1)) for _ in range(2)]

def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])

def trained(model, size):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=size)
    updates = [step(batch) for batch in batches]
    return {
        "sizes": [update.micro_batch_size for update in updates],
        "samples": [update.samples for update in updates],
        "losses": [update.loss.item() for update in updates],
    }

made = {"free": trained(free, rows)}

with open("/proc/self/status") as status:
    mapped = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (mapped + room, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    loss_fn(capped, batches[0]).backward()
    made["whole batch"] = "fits"
except RuntimeError as error:
    made["whole batch"] = str(error)
capped.zero_grad()

made["failed"] = []
is_out_of_memory = transaction.is_out_of_memory
def seen(error):
    made["failed"].append(str(error))
    return is_out_of_memory(error)
transaction.is_out_of_memory = seen

made["capped"] = trained(capped, "auto")
made["relative difference"] = max(
    ((one - other).norm() / other.norm()).item()
    for one, other in zip(capped.parameters(), free.parameters(), strict=True)
)
print(json.dumps(made))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing here tells a process's address space")
def test_a_batch_that_cannot_fit_is_trained_in_pieces_that_do() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gradaccum.__file__).parents[1]),
        # What malloc keeps for later is mapped too; large blocks with mappings of their own are given back.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(ROWS), str(ROOM_BYTES)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    made = json.loads(ended.stdout.splitlines()[-1])

    assert "can't allocate memory" in made["whole batch"]
    assert made["failed"], "no allocation failed"
    assert max(made["capped"]["sizes"]) < ROWS
    assert made["free"]["sizes"] == [ROWS] * 2
    assert made["capped"]["samples"] == made["free"]["samples"] == [ROWS] * 2
    assert made["capped"]["losses"] == pytest.approx(made["free"]["losses"], rel=SINGLE)
    assert made["relative difference"] <= SINGLE
