"""Tokens run for each real one: how a padded batch of log-normal lengths is cut, by five ways.

    python benchmarks/lengths.py [--json FILE]

256 samples of exp(4 + 0.8 z) tokens and a budget of 2,048 tokens a micro-batch, medians over 50 draws. No model runs:
what is counted is rows times the longest of each micro-batch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import write_results

import gradaccum as ga
from gradaccum.split.packing import pack

SAMPLES, BUDGET, DRAWS = 256, 2048, 50

Pieces = Sequence[Sequence[int]]


def lengths(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (4 + 0.8 * torch.randn(SAMPLES, generator=generator)).exp().clamp(1, BUDGET).int().tolist()


def padded_batch(tokens: list[int]) -> Pieces:
    return [range(len(tokens))]


def fixed_size(tokens: list[int]) -> Pieces:
    """As many samples as fit if all were as long as the longest, in the order they come, each piece trimmed."""
    size = max(1, BUDGET // max(tokens))
    return [range(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]


def greedy(tokens: list[int]) -> Pieces:
    """Longest first; a piece is closed when the next sample would exceed the budget."""
    pieces: list[list[int]] = []
    for row in sorted(range(len(tokens)), key=lambda row: -tokens[row]):
        if pieces and (len(pieces[-1]) + 1) * tokens[pieces[-1][0]] <= BUDGET:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    return pieces


def by_cost(tokens: list[int]) -> Pieces:
    batch = torch.tensor(tokens)
    split = ga.split_by_cost(lambda batch: batch, BUDGET)
    return [piece.tolist() for piece in split.plan(batch, split.largest(batch)) if isinstance(piece, torch.Tensor)]


def optimum(tokens: list[int]) -> Pieces:
    """The least padding with no more pieces than `by_cost`: at the fixed time of a piece that makes as many."""
    most = len(by_cost(tokens))
    low, high = 0.0, float(BUDGET)
    for _ in range(40):
        middle = (low + high) / 2
        pieces = pack(tokens, size=BUDGET, piece_cost=middle, max_rows=len(tokens))
        low, high = (middle, high) if len(pieces) > most else (low, middle)
    return pack(tokens, size=BUDGET, piece_cost=high, max_rows=len(tokens))


WAYS: dict[str, Callable[[list[int]], Pieces]] = {
    "the padded batch": padded_batch,
    "fixed size, trimmed": fixed_size,
    "greedy": greedy,
    "split_by_cost": by_cost,
    "optimum for as many pieces": optimum,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name, cut in WAYS.items():
        run, pieces = [], []
        for seed in range(DRAWS):
            tokens = lengths(seed)
            found = cut(tokens)
            run.append(sum(len(piece) * max(tokens[row] for row in piece) for piece in found) / sum(tokens))
            pieces.append(len(found))
        results[name] = {"tokens_run_per_real_one": statistics.median(run), "micro_batches": statistics.median(pieces)}
        print(
            f"{name:28} {results[name]['tokens_run_per_real_one']:6.3f}   {results[name]['micro_batches']:5.1f} pieces"
        )
    if arguments.json:
        write_results(arguments.json, {"lengths": results})


if __name__ == "__main__":
    main()
