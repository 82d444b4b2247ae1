"""How much of the gradient is lost by adding it up in bf16, and in fp32.

    python benchmarks/precision.py [--json FILE]

A bf16 model of three layers, 1,024 samples, cut into 16 to 1,024 micro-batches. Errors are relative, in the 2-norm over
all parameters, against the whole batch in float64. The last column is the error in fp32 as a multiple of the whole
batch's own in bf16, which is what no way of adding up can be blamed for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from torch import Tensor, nn

import gradaccum as ga

ROWS, FEATURES, WIDTH, CLASSES = 1024, 32, 64, 10
MICRO_BATCHES = (16, 64, 256, 1024)


def make(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )
    return model.to(torch.bfloat16).to(dtype)  # the same numbers in any dtype


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = (
        x @ torch.randn(FEATURES, CLASSES, generator=generator) + torch.randn(ROWS, CLASSES, generator=generator)
    ).argmax(1)
    return x.to(torch.bfloat16).to(dtype), y


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).to(torch.promote_types(batch[0].dtype, torch.float32)), batch[1])


def flat(model: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


def whole(dtype: torch.dtype) -> Tensor:
    model = make(dtype)
    loss_fn(model, data(dtype)).backward()
    return flat(model)


def accumulated(micro_batches: int, accumulate_dtype: torch.dtype | None) -> Tensor:
    model = make(torch.bfloat16)
    step = ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters()),
        loss_fn,
        micro_batch_size=ROWS // micro_batches,
        accumulate_dtype=accumulate_dtype,
    )
    step.backward(data(torch.bfloat16))
    return flat(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    expected = whole(torch.float64)

    def error(gradient: Tensor) -> float:
        return ((gradient - expected).norm() / expected.norm()).item()

    own = error(whole(torch.bfloat16))
    print(f"whole batch in bf16: {own:.1e}")
    print(f"{'micro-batches':>13}  {'added in bf16':>13}  {'added in fp32':>13}  of the whole batch's own")
    rows: list[dict[str, float]] = []
    for micro_batches in MICRO_BATCHES:
        low, wide = error(accumulated(micro_batches, None)), error(accumulated(micro_batches, torch.float32))
        rows.append({"micro_batches": micro_batches, "bf16": low, "fp32": wide, "fp32_of_own": wide / own})
        print(f"{micro_batches:13,}  {low:13.1e}  {wide:13.1e}  {wide / own:.2f}")
    if arguments.json:
        write_results(arguments.json, {"whole_batch_in_bf16": own, "rows": rows})


if __name__ == "__main__":
    main()
