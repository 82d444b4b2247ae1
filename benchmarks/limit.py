"""What is there to be had? GPT-2 small's shape with layers written anew, which add weight gradients up in place.

    python benchmarks/limit.py [--json FILE] [--rounds N] [--threads N] [--together]

The updates of gpt.py, made by hand: no hooks, no graph that is read, only torch's own products (_by_hand.py). What the
library takes more than that is its own; the rest is what the machine takes for micro-batches of that size.

    micro-steps       an update of 8 micro-batches of one sequence of 256 tokens
    time for space    an update of 8 sequences of 128 tokens, whole and in pieces of 1 and 2

Runs are made and compared as in gpt.py. Needs 12 GB and takes three minutes a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _by_hand import by_hand
from _common import write_results
from _gpt import SHAPES
from _loops import Job, accumulator, textbook, train_step
from _timing import Loop
from gpt import MICRO_BATCHES, SPACE_TOKENS, timed

TOKENS = 256

MICRO_STEPS: dict[str, Callable[[Job], Loop]] = {
    "textbook loop": textbook,
    "in place by hand": by_hand,
    "gradaccum, fused=True": partial(accumulator, fused=True),
}

TIME_FOR_SPACE: dict[str, Callable[[Job], Loop]] = {
    "whole batch": partial(textbook, rows=MICRO_BATCHES),
    "by hand, pieces of 1": by_hand,
    "gradaccum, pieces of 1": partial(train_step, size=1),
    "by hand, pieces of 2": partial(by_hand, rows=2),
    "gradaccum, pieces of 2": partial(train_step, size=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--together", action="store_true", help="all loops in one process, which moves their times")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    context = SHAPES[arguments.shape].context
    tokens, space_tokens = min(TOKENS, context), min(SPACE_TOKENS, context)
    results = {
        "time_for_space": timed(TIME_FOR_SPACE, space_tokens, arguments, f"{MICRO_BATCHES} x {space_tokens} tokens"),
        "micro_steps": {
            str(tokens): timed(MICRO_STEPS, tokens, arguments, f"{MICRO_BATCHES} micro-batches of {tokens} tokens")
        },
    }
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
