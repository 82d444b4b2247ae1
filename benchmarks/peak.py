"""Does peak memory depend on the batch?

    python benchmarks/peak.py [--json FILE]

A convolution net trains with micro-batches of 8, and batches of 8, 16, ..., 8,192: from 1x to 1,024x. Counted is what
training allocates beyond what is there before an update: gradients, activations, temporaries, the micro-batch. The
batch itself lies outside: it is on the host, and made before. The first update of each trainer, which allocates the
optimizer's state, is not counted.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from torch import nn

import gradaccum as ga
from gradaccum.memory.live_bytes import measured_peak

MICRO_BATCH = 8
TIMES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
CHANNELS, SIDE = 3, 24


def job() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return model, torch.optim.AdamW(model.parameters())


def batch_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, CHANNELS, SIDE, SIDE), torch.randint(0, 10, (rows,))


def peak_bytes(rows: int, micro_batch_size: int, device: torch.device) -> int:
    """The most that one update takes besides what is there before it."""
    torch.manual_seed(0)
    model, optimizer = job()
    model.to(device)
    step = ga.TrainStep(
        model,
        optimizer,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        micro_batch_size=micro_batch_size,
    )
    step(batch_of(micro_batch_size))
    batch = batch_of(rows)
    gc.collect()
    with measured_peak(device) as memory:
        step(batch)
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks: dict[int, int] = {}
    print(f"micro-batches of {MICRO_BATCH}, peak memory of an update on {device.type}")
    for times in TIMES:
        peaks[times] = peak_bytes(times * MICRO_BATCH, MICRO_BATCH, device)
        print(f"{times:6}x  {times * MICRO_BATCH:6} samples  {peaks[times] / 2**10:9.1f} KiB  "
              f"{peaks[times] / peaks[TIMES[0]]:6.3f}")  # fmt: skip
    whole = peak_bytes(64 * MICRO_BATCH, 64 * MICRO_BATCH, device)
    print(f"    64x in one piece     {whole / 2**10:9.1f} KiB  {whole / peaks[TIMES[0]]:6.3f}")
    spread = max(peaks.values()) / min(peaks.values()) - 1
    print(f"largest over smallest: {spread:+.2%}")
    if arguments.json:
        results: dict[str, Any] = {
            "device": device.type,
            "micro_batch_size": MICRO_BATCH,
            "peak_bytes": peaks,
            "peak_bytes_of_64x_in_one_piece": whole,
            "spread": spread,
        }
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
