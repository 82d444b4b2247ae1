"""What a window saves under autocast by casting each weight once, instead of once a micro-batch.

    python benchmarks/casts.py [--json FILE]

Six layers of Linear(2048, 2048) in fp32 under bf16 autocast, micro-batches of 8 to 128 rows, 8 a window, SGD. The same
`TrainStep` runs with torch's cache of casts and without it (``cache_enabled=False``), by turns; compared is the median
of each round's ratio. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import write_results
from torch import Tensor, nn

import gradaccum as ga

LAYERS, WIDTH, MICRO_BATCHES = 6, 2048, 8
ROWS = (8, 32, 128)
ROUNDS = 11


def loss_fn(cache_enabled: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=cache_enabled):
            return model(x).float().square().mean()

    return loss


def seconds(train_step: ga.TrainStep, batch: Tensor) -> float:
    start = time.perf_counter()
    float(train_step(batch).loss)
    return time.perf_counter() - start


def measure(model: nn.Module, rows: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kept, recast = (
        ga.TrainStep(model, optimizer, loss_fn(is_kept), micro_batch_size=rows) for is_kept in (True, False)
    )
    batch = torch.randn(rows * MICRO_BATCHES, WIDTH, device=next(model.parameters()).device)
    for train_step in (kept, recast):  # to warm up
        train_step(batch)
    times = [(seconds(kept, batch), seconds(recast, batch)) for _ in range(ROUNDS)]
    return {
        "rows": rows,
        "seconds_kept": statistics.median(one for one, _ in times),
        "seconds_recast": statistics.median(other for _, other in times),
        "ratio": statistics.median(one / other for one, other in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'rows':>5}  {'cast once':>10}  {'cast anew':>10}  ratio")
    results: list[dict[str, Any]] = []
    for rows in ROWS:
        found = measure(model, rows)
        results.append(found)
        print(f"{rows:5}  {found['seconds_kept']:9.3f}s  {found['seconds_recast']:9.3f}s  {found['ratio']:.2f}")
    if arguments.json:
        write_results(arguments.json, {"micro_batches": MICRO_BATCHES, "rows": results})


if __name__ == "__main__":
    main()
