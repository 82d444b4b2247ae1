"""What would it save to add up the weight gradients of convolutions in place?

    python benchmarks/additions.py [--json FILE] [--rounds N] [--threads N]

ResNet-50's shape, pictures of 224 x 224 and of 64 x 64, micro-batches of 1 to 8 of them, fp32. Timed are

    a micro-step            forward and backward, with gradients there already: each new one is added to what is there
    without additions       the same with no gradients there: torch takes each new one as it is
    the additions alone     `grad.add_(new)` for every convolution's weight

The last one's share of the first is what could be saved at most by adding in place; the difference of the first two is
the same share, with more noise. 12 bytes move for each element of a weight: two numbers are read, one is written.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _resnet import resnet_50, small
from _timing import Loop, measure
from torch import nn

IMAGES = (1, 2, 4, 8)
SIDES = (224, 64)


def loops_of(model: nn.Module, images: int, side: int) -> dict[str, Loop]:
    pictures, labels = torch.randn(images, 3, side, side), torch.randint(10, (images,))
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    kept = [torch.zeros_like(weight) for weight in weights]
    new = [torch.randn_like(weight) for weight in weights]

    def micro_step() -> None:
        F.cross_entropy(model(pictures), labels).backward()

    def without_additions() -> None:
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        micro_step()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # the next micro-step finds gradients again

    def additions() -> None:
        for one, other in zip(kept, new, strict=True):
            one.add_(other)

    micro_step()
    return {"a micro-step": micro_step, "without additions": without_additions, "the additions alone": additions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="in a micro-batch")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of a picture, in pixels")
    parser.add_argument("--small", action="store_true", help="convolution.py's network instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = small() if arguments.small else resnet_50()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':22} seconds of a micro-step, without additions, the additions alone; and their share")
    for side in arguments.sides:
        results[str(side)] = {}
        for images in arguments.images:
            times = measure(loops_of(model, images, side), arguments.rounds)
            share = times["the additions alone"].ratio
            results[str(side)][str(images)] = {name: asdict(of) for name, of in times.items()} | {"share": share}
            seconds = "".join(f"{of.seconds:9.3f}" for of in times.values())
            print(f"{images:3} of {side:3} x {side:3} pixels {seconds}   {share:6.1%}", flush=True)
    if arguments.json:
        write_results(arguments.json, {"sides": results})


if __name__ == "__main__":
    main()
