"""GPT-2 small's shape: the textbook loop against the library, with weight gradients added up in place and without.

    python benchmarks/gpt.py [--json FILE] [--rounds N] [--threads N]

12 layers, width 768, 12 heads, a vocabulary of 50,257 that is also the last layer, fp32, SGD. Two questions:

    micro-steps       an update of 8 micro-batches of one sequence of 32, 128 or 256 tokens: what do the loops take?
    time for space    an update of 8 sequences of 128 tokens, whole and in pieces of 1 and 2: what does accumulation
                      cost in time? 1.00 is the whole batch's own time, on the memory of eight times the activations.

All loops make the same update. Runs alternate; what is compared is the median of the ratios to the first loop in the
same round, of wall time and of processor time, which other programs on the machine disturb less. Needs 4 GB and takes
a few minutes a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from torch import Tensor, nn

import gradaccum as ga

LAYERS, WIDTH, HEADS, WORDS, CONTEXT = 12, 768, 12, 50_257, 1024
TOKENS = (32, 128, 256)
MICRO_BATCHES = 8
SPACE_TOKENS = 128

Batch = tuple[Tensor, Tensor]
Loop = Callable[[], object]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, time, _ = x.shape
        parts = self.attention(self.before_attention(x)).view(rows, time, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(rows, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    words, targets = batch
    return F.cross_entropy(model(words).flatten(0, 1), targets.flatten())


def make_batch(rows: int, tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(WORDS, (2, rows, tokens), generator=generator)
    return both[0], both[1]


def pieces(batch: Batch, rows: int) -> list[Batch]:
    return list(zip(batch[0].split(rows), batch[1].split(rows), strict=True))


def textbook(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> Loop:
    def update() -> None:
        for micro_batch in micro_batches:
            loss = loss_fn(model, micro_batch) / len(micro_batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def accumulator(model: nn.Module, optimizer: Any, micro_batches: list[Batch], fused: Any) -> Loop:
    accumulator = ga.Accumulator(model, optimizer, micro_batches=len(micro_batches), fused=fused)

    def update() -> None:
        for micro_batch in accumulator.over(micro_batches):
            accumulator.backward(loss_fn(model, micro_batch))

    return update


def train_step(model: nn.Module, optimizer: Any, batch: Batch, rows: int) -> Loop:
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=rows)
    return lambda: step(batch)


def measure(loops: dict[str, Loop], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds an update, and ratios to the first loop."""
    wall: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):
        for name, loop in loops.items():
            started = time.perf_counter(), time.process_time()
            loop()
            if round_:  # the first is to warm up
                wall[name].append(time.perf_counter() - started[0])
                processor[name].append(time.process_time() - started[1])
    base = next(iter(loops))
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "ratio": _ratio(wall[name], wall[base]),
            "processor_seconds": statistics.median(processor[name]),
            "processor_ratio": _ratio(processor[name], processor[base]),
        }
        for name in loops
    }


def _ratio(mine: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))


@contextmanager
def _job() -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = GPT()
    yield model, torch.optim.SGD(model.parameters(), lr=1e-4)


def micro_steps(tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    with _job() as (model, optimizer):
        micro_batches = pieces(make_batch(MICRO_BATCHES, tokens), 1)
        return measure(
            {
                "textbook loop": textbook(model, optimizer, micro_batches),
                "gradaccum, fused=True": accumulator(model, optimizer, micro_batches, True),
                "gradaccum, default": accumulator(model, optimizer, micro_batches, "auto"),
                "gradaccum, fused=False": accumulator(model, optimizer, micro_batches, False),
            },
            rounds,
        )


def time_for_space(rounds: int) -> dict[str, dict[str, float]]:
    with _job() as (model, optimizer):
        batch = make_batch(MICRO_BATCHES, SPACE_TOKENS)
        return measure(
            {
                "whole batch": textbook(model, optimizer, [batch]),
                "textbook loop, pieces of 1": textbook(model, optimizer, pieces(batch, 1)),
                "gradaccum, pieces of 1": train_step(model, optimizer, batch, 1),
                "textbook loop, pieces of 2": textbook(model, optimizer, pieces(batch, 2)),
                "gradaccum, pieces of 2": train_step(model, optimizer, batch, 2),
            },
            rounds,
        )


def gradient_difference() -> float:
    """The largest difference between a gradient of the library's and of the textbook loop's, relative in the 2-norm."""
    with _job() as (model, optimizer):
        batch = make_batch(4, 32)
        for micro_batch in pieces(batch, 1):
            (loss_fn(model, micro_batch) / 4).backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=1, fused=True).backward(batch)
        return max(
            ((parameter.grad - right).norm() / right.norm()).item()  # type: ignore[operator, union-attr]
            for parameter, right in zip(model.parameters(), expected, strict=True)
        )


def show(title: str, results: dict[str, dict[str, float]]) -> None:
    print(title)
    for name, result in results.items():
        print(
            f"  {name:28} {result['seconds']:7.2f} s   {result['ratio']:5.2f}   "
            f"processor {result['processor_seconds']:7.2f} s   {result['processor_ratio']:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("micro-steps", "time-for-space"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"gradient_difference": gradient_difference()}
    print(f"largest relative difference of a gradient: {results['gradient_difference']:.1e}")
    if arguments.only != "time-for-space":
        results["micro_steps"] = {}
        for tokens in TOKENS:
            results["micro_steps"][str(tokens)] = micro_steps(tokens, arguments.rounds)
            show(f"{MICRO_BATCHES} micro-batches of {tokens} tokens", results["micro_steps"][str(tokens)])
    if arguments.only != "micro-steps":
        results["time_for_space"] = time_for_space(arguments.rounds)
        show(f"{MICRO_BATCHES} x {SPACE_TOKENS} tokens", results["time_for_space"])
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
