"""What does a loss over the whole batch cost?

    python benchmarks/two_pass.py [--json FILE]

Two encoders (a transformer over 32 tokens, a convolution net) train with InfoNCE over a batch of 128 pairs in micro-
batches of 8. They have no dropout, whose random numbers a CPU draws so slowly that a forward takes as long as its
backward. "one pass" is what no way of running micro-batches can do without: one forward and one backward of each,
with a loss of its own (so it trains with another gradient). Against it: the library with all graphs kept, with half
of them, with none; and the usual two passes written by hand, which run every forward twice (GradCache). Rounds of all
of them alternate; the median of a round's ratios counts. Peaks are live tensor bytes of one update.
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
from gradaccum.memory.live_bytes import measured_peak

PAIRS, MICRO_BATCH = 128, 8
ROUNDS = 9

Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Four layers over 32 tokens of width 128; the mean over the tokens is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids)).mean(dim=1)


def convolution_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 64),
    )


JOBS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "transformer": lambda: (
        Transformer(),
        (torch.randint(0, 1000, (PAIRS, 32)), torch.randint(0, 1000, (PAIRS, 32))),
    ),
    "convolution net": lambda: (convolution_net(), (torch.randn(PAIRS, 3, 32, 32), torch.randn(PAIRS, 3, 32, 32))),
}


def forward(model: nn.Module, pairs: Batch) -> tuple[Tensor, Tensor]:
    return F.normalize(model(pairs[0]), dim=1), F.normalize(model(pairs[1]), dim=1)


def contrastive(outputs: tuple[Tensor, Tensor], pairs: Batch) -> Tensor:
    return F.cross_entropy(outputs[0] @ outputs[1].T / 0.07, torch.arange(len(outputs[0])))


def one_pass(model: nn.Module) -> Callable[[Batch], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update(batch: Batch) -> None:
        for pairs in zip(*(column.split(MICRO_BATCH) for column in batch), strict=True):
            contrastive(forward(model, pairs), pairs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def by_hand(model: nn.Module) -> Callable[[Batch], Any]:
    """Two passes as they are usually written; dropout would not be replayed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update(batch: Batch) -> None:
        pieces = list(zip(*(column.split(MICRO_BATCH) for column in batch), strict=True))
        with torch.no_grad():
            outputs = [forward(model, pairs) for pairs in pieces]
        leaves = [[part.requires_grad_() for part in output] for output in outputs]
        joined = torch.cat([leaf[0] for leaf in leaves]), torch.cat([leaf[1] for leaf in leaves])
        contrastive(joined, batch).backward()
        for pairs, leaf in zip(pieces, leaves, strict=True):
            torch.autograd.backward(forward(model, pairs), [part.grad for part in leaf])
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(kept_graphs: int | None) -> Callable[[nn.Module], Callable[[Batch], Any]]:
    return lambda model: ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        forward=forward,
        batch_loss=contrastive,
        micro_batch_size=MICRO_BATCH,
        kept_graphs=kept_graphs,
    )


PIECES = PAIRS // MICRO_BATCH
WAYS: dict[str, Callable[[nn.Module], Callable[[Batch], Any]]] = {
    "one pass": one_pass,
    "gradaccum, what fits": ours(None),
    f"gradaccum, {PIECES // 2} of {PIECES} kept": ours(PIECES // 2),
    "gradaccum, none kept": ours(0),
    "two passes by hand": by_hand,
}


def seconds_of(update: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.perf_counter()
    update(batch)
    return time.perf_counter() - start


def measure(job: Callable[[], tuple[nn.Module, Batch]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = job()
    ways = {name: make(copy.deepcopy(model)) for name, make in WAYS.items()}
    peaks: dict[str, int] = {}
    for name, update in ways.items():
        update(batch)  # warm up
        with measured_peak(torch.device("cpu")) as meter:
            update(batch)
        peaks[name] = meter.peak
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        seconds = {name: seconds_of(update, batch) for name, update in ways.items()}
        for name in ways:
            ratios[name].append(seconds[name] / seconds["one pass"])
    return {
        name: {"time": statistics.median(ratios[name]), "peak_bytes": peaks[name], "ratios": ratios[name]}
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, job in JOBS.items():
        result = results[name] = measure(job, arguments.rounds)
        print(f"{name}: time of one pass, peak")
        for way, seen in result.items():
            print(f"    {way:28}{seen['time']:6.3f}{seen['peak_bytes'] / 2**20:10.1f} MiB")
    if arguments.json:
        write_results(arguments.json, {"pairs": PAIRS, "micro_batch": MICRO_BATCH, "jobs": results})


if __name__ == "__main__":
    main()
