"""GPT-2 small's shape: the textbook loop, its peers, and the library with and without weight gradients added in place.

    python benchmarks/gpt.py [--json FILE] [--rounds N] [--threads N] [--no-peers] [--together]

12 layers, width 768, 12 heads, a vocabulary of 50,257 that is also the last layer, fp32, SGD. Three questions:

    micro-steps       an update of 8 micro-batches of one sequence of 32, 128 or 256 tokens: what do the loops take?
    time for space    an update of 8 sequences of 128 tokens, whole and in pieces of 1 and 2: what does accumulation
                      cost in time? 1.00 is the whole batch's own time, on the memory of eight times the activations.
    own-python        which share of an update's time is the library's own Python? Under a profiler, which adds to it.

All loops make the same update, each in a process of its own. Runs alternate; what is compared is the median of the
ratios to the first loop in the same round, of wall time and of processor time, which other programs on the machine
disturb less. Needs 12 GB and takes five to ten minutes a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _apart import apart, together
from _common import write_results
from _gpt import GPT, SHAPES, Shape, loss_fn, make_batch
from _loops import Job, accumulator, peers, pieces, textbook, train_step
from _own import own_share
from _timing import Loop, compare

import gradaccum as ga

TOKENS = (32, 128, 256)
MICRO_BATCHES = 8
SPACE_TOKENS = 128
DIFFERENCE_TOKENS = 32
QUESTIONS = ("micro-steps", "time-for-space", "own-python")

Results = dict[str, dict[str, float]]


def make_job(shape: Shape, tokens: int) -> Job:
    """An update of `MICRO_BATCHES` sequences, one in a micro-batch."""
    torch.manual_seed(0)
    model = GPT(shape)
    micro_batches = pieces(make_batch(shape, MICRO_BATCHES, tokens), 1)
    return Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        loss_fn=loss_fn,
        micro_batches=micro_batches,
    )


MICRO_STEPS: dict[str, Callable[[Job], Loop]] = {
    "textbook loop": textbook,
    "gradaccum, fused=True": partial(accumulator, fused=True),
    "gradaccum, default": accumulator,
    "gradaccum, fused=False": partial(accumulator, fused=False),
}

TIME_FOR_SPACE: dict[str, Callable[[Job], Loop]] = {
    "whole batch": partial(textbook, rows=MICRO_BATCHES),
    "textbook loop, pieces of 1": textbook,
    "gradaccum, pieces of 1": partial(train_step, size=1),
    "textbook loop, pieces of 2": partial(textbook, rows=2),
    "gradaccum, pieces of 2": partial(train_step, size=2),
}


def make_loop(make: Callable[[Job], Loop], shape: Shape, tokens: int) -> Loop:
    """A loop with a job of its own."""
    return make(make_job(shape, tokens))


def gradient_difference(job: Job) -> float:
    """The largest difference between a gradient of the library's and of the textbook loop's, relative in the 2-norm."""
    parameters = list(job.model.parameters())
    for micro_batch in job.micro_batches:
        (loss_fn(job.model, micro_batch) / len(job.micro_batches)).backward()
    expected = [parameter.grad for parameter in parameters]
    job.model.zero_grad()
    ga.TrainStep(job.model, job.optimizer, loss_fn, micro_batch_size=1, fused=True).backward(job.batch())
    return max(
        ((parameter.grad - right).norm() / right.norm()).item()  # type: ignore[operator, union-attr]
        for parameter, right in zip(parameters, expected, strict=True)
    )


def own_python(shape: Shape, every: Sequence[int]) -> dict[str, float]:
    """The library's own share of an update, for each number of tokens in a micro-batch."""
    shares = {str(tokens): own_share(accumulator(make_job(shape, tokens), fused=True)) for tokens in every}
    print("the library's own Python, of an update's time")
    for tokens, share in shares.items():
        print(f"  {MICRO_BATCHES} micro-batches of {tokens + ' tokens':14} {share:8.2%}", flush=True)
    return shares


def timed(loops: dict[str, Callable[[Job], Loop]], tokens: int, arguments: argparse.Namespace, title: str) -> Results:
    makers = {name: partial(make_loop, make, SHAPES[arguments.shape], tokens) for name, make in loops.items()}
    with (together if arguments.together else apart)(makers) as runs:
        results = {name: asdict(times) for name, times in compare(runs, arguments.rounds).items()}
    print(title)
    for name, result in results.items():
        print(
            f"  {name:28} {result['seconds']:7.2f} s   {result['ratio']:5.2f}   "
            f"processor {result['processor_seconds']:7.2f} s   {result['processor_ratio']:5.2f}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=QUESTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="in a micro-batch of the micro-steps")
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="Accelerate and Fabric")
    parser.add_argument("--together", action="store_true", help="all loops in one process, which moves their times")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    results: dict[str, Any] = {"gradient_difference": gradient_difference(make_job(shape, DIFFERENCE_TOKENS))}
    print(f"largest relative difference of a gradient: {results['gradient_difference']:.1e}")
    questions = QUESTIONS if arguments.only is None else (arguments.only,)
    if "micro-steps" in questions:
        results["micro_steps"] = {}
        loops = MICRO_STEPS | (peers() if arguments.peers else {})
        for tokens in arguments.tokens:
            title = f"{MICRO_BATCHES} micro-batches of {tokens} tokens"
            results["micro_steps"][str(tokens)] = timed(loops, tokens, arguments, title)
    if "time-for-space" in questions:
        tokens = min(SPACE_TOKENS, shape.context)
        title = f"{MICRO_BATCHES} x {tokens} tokens"
        results["time_for_space"] = timed(TIME_FOR_SPACE, tokens, arguments, title)
    if "own-python" in questions:
        results["own_python"] = own_python(shape, arguments.tokens)
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
