"""What does BatchNorm of the whole batch cost, in time and in memory?

    python benchmarks/lockstep.py [--json FILE] [--rounds N] [--channels N]

A residual network in float32 takes batches of 64 images: whole, in micro-batches of 8 that are normalised by themselves
(another gradient), in groups of 8, and in lockstep with activations where they may wait. Times are the least of several
rounds, in which the ways take turns; each is compared with the whole batch's of the same run. Memory is the peak of
live bytes of an update besides what is there before, on CUDA the allocator's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.memory.live_bytes import measured_peak

ROWS, MICRO_BATCH = 64, 8
BLOCKS, SIDE = 6, 16
ROUNDS = 7

WAYS: dict[str, dict[str, Any]] = {
    "whole batch": {"micro_batch_size": ROWS},
    "by themselves (inexact)": {"micro_batch_size": MICRO_BATCH},
    "groups of 8": {"micro_batch_size": MICRO_BATCH, "batch_norm": ga.GhostBatch(MICRO_BATCH)},
    "exact, device": {"micro_batch_size": MICRO_BATCH, "batch_norm": "exact"},
    "exact, recompute": {"micro_batch_size": MICRO_BATCH, "batch_norm": "exact", "activations": "recompute"},
    "exact, host": {"micro_batch_size": MICRO_BATCH, "batch_norm": "exact", "activations": "host"},
}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--channels", type=int, default=16)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ga.BatchNormWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = nn.Sequential(
        nn.Conv2d(3, arguments.channels, 3, padding=1),
        nn.Sequential(*[Block(arguments.channels) for _ in range(BLOCKS)]),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(arguments.channels, 10)),
    ).to(device)
    batch = torch.randn(ROWS, 3, SIDE, SIDE), torch.randint(0, 10, (ROWS,))
    steps: dict[str, ga.TrainStep] = {}
    for name, options in WAYS.items():
        if device.type == "cpu" and options.get("activations") == "host":
            continue  # where the host is the device, nothing is copied
        model = copy.deepcopy(start)
        steps[name] = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.01), loss_fn, **options)
        steps[name](batch)
    seconds = dict.fromkeys(steps, float("inf"))
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        gc.collect()
        with measured_peak(device) as memory:
            step(batch)
        peaks[name] = memory.peak
    whole, micro = "whole batch", "by themselves (inexact)"
    results: dict[str, Any] = {}
    print(f"{ROWS} samples in micro-batches of {MICRO_BATCH}, on {device.type}; of the whole batch's (of theirs)")
    for name in steps:
        results[name] = {"time": seconds[name] / seconds[whole], "peak": peaks[name] / peaks[whole]}
        of_micro = results[name]["time_of_micro_batches"] = seconds[name] / seconds[micro]
        print(f"{name:26}  time {results[name]['time']:5.2f} ({of_micro:5.2f})   peak {results[name]['peak']:5.2f}")
    if arguments.json:
        shape = {"channels": arguments.channels, "rows": ROWS, "micro_batch_size": MICRO_BATCH}
        write_results(arguments.json, {"device": device.type, **shape, "of_the_whole_batchs": results})


if __name__ == "__main__":
    main()
