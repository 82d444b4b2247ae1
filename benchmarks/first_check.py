"""What the check before the first update costs: its seconds over those of 200 updates, in one run.

    python benchmarks/first_check.py [--rounds N] [--layers N] [--width N] [--json FILE]

Two jobs: a GPT of GPT-2's form (4 layers of width 256, a vocabulary of 8,192, 128 tokens a sequence; --layers 12
--width 768 is GPT-2 small) and a residual network of bottlenecks of ResNet-18's depth. A batch has 32 samples, a
micro-batch 8, so that the check looks at 8 samples together and in pieces of 5 and 3.

Three loops: an update of a step that is warm; the first update of a new step without the check; and with it. The check
is the difference of the last two. Rounds alternate, and medians of processor time are compared, as other programs
disturb wall time more than the difference is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _gpt import GPT, Shape, loss_fn, make_batch
from _resnet import convolution, resnet
from _timing import measure
from torch import Tensor, nn

import gradaccum as ga

ROWS, MICRO_BATCH, TOKENS, SIDE, CLASSES = 32, 8, 128, 64, 100
UPDATES = 200
LIMIT = 0.01  # of the time of so many updates

Job = tuple[nn.Module, Callable[[Any, Any], Tensor], Any]


def gpt(layers: int = 4, width: int = 256) -> Job:
    shape = Shape(layers=layers, width=width, heads=width // 64, words=8_192)
    torch.manual_seed(0)
    return GPT(shape), loss_fn, make_batch(shape, ROWS, TOKENS)


def pictures(width: int = 16) -> Job:
    torch.manual_seed(0)
    model = resnet((2, 2, 2, 2), width, CLASSES, convolution(3, width, 7, 2))
    batch = torch.randn(ROWS, 3, SIDE, SIDE), torch.randint(CLASSES, (ROWS,))
    return model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch


def make_step(job: Job, **options: Any) -> ga.TrainStep:
    model, loss, _ = job
    return ga.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.0), loss, micro_batch_size=MICRO_BATCH, **options
    )


def cost(job: Job, rounds: int) -> dict[str, float]:
    """Seconds of the check and of an update, and their ratio over `UPDATES` updates."""
    warm = make_step(job, check="off")
    loops = {
        "update": lambda: warm(job[2]),
        "first, unchecked": lambda: make_step(job, check="off")(job[2]),
        "first, checked": lambda: make_step(job)(job[2]),
    }
    times = measure(loops, rounds)
    update = times["update"].processor_seconds
    check = times["first, checked"].processor_seconds - times["first, unchecked"].processor_seconds
    return {
        "update_seconds": update,
        "check_seconds": check,
        "updates": check / update,
        "share": check / update / UPDATES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {f"GPT {arguments.layers} x {arguments.width}": partial(gpt, arguments.layers, arguments.width),
            "ResNet": pictures}  # fmt: skip
    results = {name: cost(make(), arguments.rounds) for name, make in jobs.items()}
    for name, one in results.items():
        print(
            f"{name:16} an update {one['update_seconds']:6.3f} s, the check {one['check_seconds']:6.3f} s: "
            f"{one['updates']:.2f} updates, {one['share']:.2%} of {UPDATES}"
        )
    if arguments.json:
        write_results(arguments.json, {"limit": LIMIT, "jobs": results})


if __name__ == "__main__":
    main()
