"""Does micro_batch_size="auto" find the fastest size, and how soon?

    python benchmarks/sizes.py [--json FILE]

An MLP, a convolution net and a transformer train with batches of 256. Every fixed size (2, 4, ..., 256) is timed,
rounds of all sizes alternating; the median of a size's times is what counts. Between the rounds new trainers with
"auto" make three updates, and say which size the fourth takes: its throughput over that of the best fixed size is the
result. Run it on an idle machine; on one that is not, look at the median of the searches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from torch import Tensor, nn

import gradaccum as ga

ROWS = 256
SIZES = [2, 4, 8, 16, 32, 64, 128, 256]
ROUNDS = 7
SEARCHED_UPDATES = 3

Batch = tuple[Tensor, Tensor]


def mlp() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, (torch.randn(ROWS, 256), torch.randint(0, 10, (ROWS,)))


def convolution_net() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return model, (torch.randn(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,)))


class Transformer(nn.Module):
    """Two layers over 32 tokens of width 64; the first token's output is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.words(ids))[:, 0])


def transformer() -> tuple[nn.Module, Batch]:
    return Transformer(), (torch.randint(0, 1000, (ROWS, 32)), torch.randint(0, 10, (ROWS,)))


JOBS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "MLP": mlp,
    "convolution net": convolution_net,
    "transformer": transformer,
}


def trainer(model: nn.Module, size: Any) -> ga.TrainStep:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return ga.TrainStep(
        model, optimizer, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), micro_batch_size=size
    )


def seconds_of(step: ga.TrainStep, batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def measure(job: Callable[[], tuple[nn.Module, Batch]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = job()
    fixed = {size: trainer(model, size) for size in SIZES}
    for step in fixed.values():
        step(batch)  # warm up
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    chosen: list[int] = []
    for _ in range(rounds):
        for size, step in fixed.items():
            seconds[size].append(seconds_of(step, batch))
        auto = trainer(model, "auto")
        for _ in range(SEARCHED_UPDATES):
            auto(batch)
        chosen.append(auto(batch).micro_batch_size)
    rates = {size: ROWS / statistics.median(times) for size, times in seconds.items()}
    best = max(rates, key=rates.__getitem__)
    parts = [rates[size] / rates[best] for size in chosen]
    return {
        "samples_per_second": rates,
        "best": best,
        "chosen": chosen,
        "of_best": {"median": statistics.median(parts), "worst": min(parts)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("samples a second, in micro-batches of" + "".join(f"{size:>8}" for size in SIZES))
    results = {}
    for name, job in JOBS.items():
        result = results[name] = measure(job, arguments.rounds)
        print(f"{name:37}" + "".join(f"{result['samples_per_second'][size]:8.0f}" for size in SIZES))
        print(
            f"{'':6}auto, after {SEARCHED_UPDATES} updates: {', '.join(map(str, result['chosen']))}; "
            f"{result['of_best']['median']:.3f} of the best (worst search {result['of_best']['worst']:.3f})"
        )
    if arguments.json:
        write_results(arguments.json, {"rows": ROWS, "jobs": results})


if __name__ == "__main__":
    main()
