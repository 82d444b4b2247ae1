"""A convolution net: what the loops cost, and which micro-batch size is fastest.

    python benchmarks/convolution.py [--json FILE] [--rounds N] [--threads N] [--no-peers]

A small residual network with GroupNorm takes batches of 64 pictures of 32 x 32, fp32, SGD. Two questions:

    loops             micro-batches of 8: what do the loops take, as multiples of the textbook loop's time?
    sizes             the whole batch against micro-batches of 1 to 32: as multiples of the whole batch's time, and the
                      size that "auto" takes after its three updates of searching.

Runs alternate; medians of the ratios within a round. Each loop's gradient is held against the whole batch's in float64.
Convolutions are not fused, so nothing is saved in a micro-step; additions.py says what there would be to save.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _loops import Job, accumulator, error, exact_gradient, gradient_of, peers, pieces, textbook, train_step
from _resnet import small
from _timing import Loop, measure
from torch import Tensor, nn

import gradaccum as ga

ROWS, SIDE, CLASSES = 64, 32, 10
MICRO_BATCH = 8
SIZES = (1, 2, 4, 8, 16, 32)
SEARCHED_UPDATES, SEARCHES = 3, 5


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_job(rows: int = ROWS, side: int = SIDE) -> Job:
    torch.manual_seed(0)
    model = small()
    batch = torch.randn(rows, 3, side, side), torch.randint(CLASSES, (rows,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return Job(model=model, optimizer=optimizer, loss_fn=loss_fn, micro_batches=pieces(batch, MICRO_BATCH))


def loops_of(job: Job, *, with_peers: bool) -> dict[str, Loop]:
    rows = len(job.batch()[0])
    return {
        "textbook loop": textbook(job),
        "gradaccum Accumulator": accumulator(job),
        "gradaccum TrainStep": train_step(job, MICRO_BATCH),
        'gradaccum TrainStep, "auto"': train_step(job, "auto"),
        "whole batch": textbook(job.cut(rows)),
        **({name: make(job) for name, make in peers().items()} if with_peers else {}),
    }


def sizes_of(job: Job) -> dict[str, Loop]:
    rows = len(job.batch()[0])
    return {str(rows): train_step(job, rows)} | {str(size): train_step(job, size) for size in SIZES if size < rows}


def chosen(job: Job) -> int:
    """The size that a new trainer takes once it has searched."""
    step = ga.TrainStep(job.model, job.optimizer, job.loss_fn)
    return [step(job.batch()).micro_batch_size for _ in range(SEARCHED_UPDATES + 1)][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=ROWS, help="pictures in a batch")
    parser.add_argument("--side", type=int, default=SIDE, help="of a picture, in pixels")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="Accelerate and Fabric")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job = make_job(arguments.rows, arguments.side)
    loops, exact = loops_of(job, with_peers=arguments.peers), exact_gradient(job)
    results: dict[str, Any] = {"rows": arguments.rows, "micro_batch": MICRO_BATCH, "loops": {}, "sizes": {}}
    errors = {name: error(gradient_of(job, loop), exact) for name, loop in loops.items()}
    for _ in range(SEARCHED_UPDATES):
        loops['gradaccum TrainStep, "auto"']()  # what is timed is what it found
    print(f"{arguments.rows} pictures in micro-batches of {MICRO_BATCH}; error of the gradient")
    for name, times in measure(loops, arguments.rounds).items():
        results["loops"][name] = asdict(times) | {"error": errors[name]}
        print(f"  {name:28} {times.seconds:7.3f} s   {times.ratio:5.2f}   {errors[name]:.0e}")
    print("micro-batch size, of the whole batch's time")
    for name, times in measure(sizes_of(job), arguments.rounds).items():
        results["sizes"][name] = asdict(times)
        print(f"  {name:>28} {times.seconds:7.3f} s   {times.ratio:5.2f}")
    results["auto"] = [chosen(job) for _ in range(SEARCHES)]
    print(f'"auto" takes {", ".join(map(str, results["auto"]))}')
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
