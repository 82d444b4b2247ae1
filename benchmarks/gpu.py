"""What only a GPU shows: GPT-2 small and a GPT of a billion parameters in bf16, in time and in peak memory.

    python benchmarks/gpu.py [--json FILE] [--rounds N] [--shapes 124M 1B] [--only QUESTION ...]

    micro-steps     fp32 weights under bf16 autocast, fused AdamW, 8 micro-batches of 1,024 to 8,192 tokens: the
                    textbook loop, and weight gradients added up in place or not
    accumulators    bf16 weights: gradients added up in bf16 and in fp32. Errors are the gradient's of 64 micro-batches
                    of 64 tokens, against the whole batch in float64
    graphs          micro-batches of 128 and 512 tokens, whose kernels take less time than their launches: replayed
                    from a CUDA graph, into gradients that stay
    weights         one layer's micro-step with its gradient added up in place, as a multiple of the same without: for
                    which sizes and how many rows does that pay?

Runs alternate; compared is the median of each round's ratio. Peak memory is what an update takes beyond weights and
optimizer state: gradients, activations, temporaries. `--shapes tiny --device cpu` shows that the script works, and
leaves out what needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import write_results
from _gpt import GPT, SHAPES, Shape, loss_fn, make_batch
from _loops import Batch, Job, accumulator, error, exact_gradient, gradient_of, pieces, textbook
from _timing import Loop, measure
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.memory.live_bytes import measured_peak

MICRO_BATCHES = 8
TOKENS = (1024, 2048, 8192)
GRAPHED_TOKENS = (128, 512)
ERROR_MICRO_BATCHES, ERROR_TOKENS = 64, 64
WIDTHS, ROWS = (1024, 2048, 4096, 8192), (256, 1024, 4096, 8192, 16384)

Found = dict[str, dict[str, Any]]


def in_bf16(model: nn.Module, batch: Batch) -> Tensor:
    """The loss under autocast; the backward runs outside of it, as torch wants it."""
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        return loss_fn(model, batch)


def make_job(
    shape: Shape,
    device: torch.device,
    *,
    rows: int,
    tokens: int,
    micro_batches: int = MICRO_BATCHES,
    dtype: torch.dtype = torch.float32,
) -> Job:
    """An update of micro-batches of so many rows of so many tokens: under autocast, or with weights in bf16."""
    torch.manual_seed(0)
    with device:
        model = GPT(shape).to(dtype)
    batch = make_batch(shape, rows * micro_batches, tokens)
    return Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        loss_fn=in_bf16 if dtype is torch.float32 else loss_fn,
        micro_batches=pieces((batch[0].to(device), batch[1].to(device)), rows),
    )


def sizes(tokens: int, shape: Shape) -> dict[str, int]:
    """So many tokens in as few rows as the model takes."""
    return {"rows": max(1, tokens // shape.context), "tokens": min(tokens, shape.context)}


def peak_bytes(loop: Loop, device: torch.device) -> int:
    gc.collect()
    with measured_peak(device) as memory:
        loop()
    return memory.peak


def compared(title: str, loops: dict[str, Loop], rounds: int, device: torch.device) -> Found:
    """Times and peaks, printed and returned."""
    times = measure(loops, rounds, device=device)
    found: Found = {
        name: {**asdict(times[name]), "peak_bytes": peak_bytes(loop, device)} for name, loop in loops.items()
    }
    print(title)
    for name, of in found.items():
        print(f"  {name:44} {of['seconds'] * 1e3:9.1f} ms {of['ratio']:6.3f}   {of['peak_bytes'] / 2**30:7.2f} GiB")
    return found


def micro_steps(shape: Shape, device: torch.device, rounds: int) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for tokens in TOKENS:
        job = make_job(shape, device, **sizes(tokens, shape))
        loops = {
            "textbook loop": textbook(job),
            "gradaccum, fused=True": accumulator(job, fused=True),
            "gradaccum, default": accumulator(job),
            "gradaccum, fused=False": accumulator(job, fused=False),
        }
        title = f"{MICRO_BATCHES} micro-batches of {tokens} tokens, bf16 autocast"
        found[str(tokens)] = compared(title, loops, rounds, device)
        found[str(tokens)]["gradaccum, fused=True"]["difference"] = error(
            gradient_of(job, loops["gradaccum, fused=True"]), gradient_of(job, loops["textbook loop"])
        )
    return found


def adding_up(job: Job) -> dict[str, Loop]:
    """A bf16 model's gradients, in each dtype."""
    return {
        "textbook loop, bf16": textbook(job),
        "gradaccum, bf16": accumulator(job),
        "gradaccum, fp32, fused=True": accumulator(job, accumulate_dtype=torch.float32, fused=True),
        "gradaccum, fp32": accumulator(job, accumulate_dtype=torch.float32),
        "gradaccum, fp32, fused=False": accumulator(job, accumulate_dtype=torch.float32, fused=False),
    }


def accumulators(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tokens in TOKENS:
        job = make_job(shape, device, **sizes(tokens, shape), dtype=torch.bfloat16)
        title = f"{MICRO_BATCHES} micro-batches of {tokens} tokens, bf16 weights"
        found[str(tokens)] = compared(title, adding_up(job), rounds, device)
    return found


def errors(shape: Shape, device: torch.device) -> dict[str, float]:
    """Of a bf16 model's gradient after many micro-batches, and of the whole batch's own."""
    tokens = min(ERROR_TOKENS, shape.context)
    size = {"rows": 1, "tokens": tokens, "micro_batches": ERROR_MICRO_BATCHES}
    job = make_job(shape, device, **size, dtype=torch.bfloat16)
    exact = exact_gradient(job)
    loops = {"whole batch": textbook(job.cut(ERROR_MICRO_BATCHES)), **adding_up(job)}
    found = {name: error(gradient_of(job, loop), exact) for name, loop in loops.items()}
    print(f"error of {ERROR_MICRO_BATCHES} micro-batches of {tokens} tokens, bf16 weights")
    for name, of in found.items():
        print(f"  {name:44} {of:.2e}")
    return found


class WithLoss(nn.Module):
    """What a graph is made of: everything up to the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(self.model, (words, targets))


def graphed(job: Job) -> Job:
    """The same job, replayed. Its loss is copied, since the next replay overwrites it."""
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        model: Any = torch.cuda.make_graphed_callables(WithLoss(job.model), job.micro_batches[0])
    return Job(
        model=model,
        optimizer=job.optimizer,
        loss_fn=lambda model, batch: model(*batch).clone(),
        micro_batches=job.micro_batches,
    )


def textbook_into_zeros(job: Job) -> Loop:
    """What a loop by hand has to do where gradients are replayed."""

    def update() -> None:
        job.optimizer.zero_grad(set_to_none=False)
        for micro_batch in job.micro_batches:
            (job.loss_fn(job.model, micro_batch) / len(job.micro_batches)).backward()
        job.optimizer.step()

    for parameter in job.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return update


def graphs(shape: Shape, device: torch.device, rounds: int) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for tokens in GRAPHED_TOKENS:
        make = partial(make_job, shape, device, rows=1, tokens=min(tokens, shape.context))
        eager, replayed, by_hand = make(), graphed(make()), graphed(make())
        exact = exact_gradient(eager)
        loops = {
            "textbook loop": textbook(eager),
            "gradaccum, default": accumulator(eager),
            "textbook loop, graphs, zeros kept": textbook_into_zeros(by_hand),
            "gradaccum, graphs, persistent_gradients": accumulator(replayed, persistent_gradients=True),
        }
        jobs = dict(zip(loops, (eager, eager, by_hand, replayed), strict=True))
        wrong = {name: error(gradient_of(jobs[name], loop), exact) for name, loop in loops.items()}
        title = f"{MICRO_BATCHES} micro-batches of {tokens} tokens, bf16 autocast"
        found[str(tokens)] = compared(title, loops, rounds, device)
        for name, of in wrong.items():
            found[str(tokens)][name]["error"] = of
            print(f"  error of {name:44} {of:.2e}")
    return found


def weights(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """For each size of a weight and number of rows, in fp32 under bf16 autocast: time in place over time without."""
    found: list[dict[str, Any]] = []
    print("one layer's micro-step in place, as a multiple of the same without")
    print(f"  {'rows':>8}" + "".join(f"{width:>8}^2" for width in WIDTHS))
    for rows in ROWS:
        ratios: list[float] = []
        for width in WIDTHS:
            loops = {
                name: layer_loop(device, width, rows, fused) for name, fused in (("without", False), ("in place", True))
            }
            ratios.append(measure(loops, rounds, device=device)["in place"].ratio)
            found.append({"width": width, "rows": rows, "ratio": ratios[-1]})
        print(f"  {rows:8}" + "".join(f"{ratio:10.3f}" for ratio in ratios))
    return found


def layer_loop(device: torch.device, width: int, rows: int, fused: bool) -> Loop:
    """Four layers, so that the host's work overlaps with the device's as in a model."""
    with device:
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
        x = torch.randn(rows, width)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x).sum()

    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), micro_batches=16, fused=fused)

    def update() -> None:
        for micro_batch in accumulator.over([x] * 16):
            accumulator.backward(loss(model, micro_batch))

    return update


QUESTIONS = ("micro-steps", "accumulators", "graphs", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["124M", "1B"])
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device, rounds = torch.device(arguments.device), arguments.rounds
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing is measured. --device cpu --shapes tiny tries the script")
    results: dict[str, Any] = {"device": device.type}

    def keep(question: str, name: str, ask: Callable[[], Any]) -> None:
        """Written down after each one: what was measured outlives what fails later."""
        results.setdefault(question, {})[name] = ask()
        gc.collect()
        if arguments.json:
            write_results(arguments.json, results)

    for name in arguments.shapes:
        shape = SHAPES[name]
        print(f"\n{name}: {shape}", flush=True)
        if "micro-steps" in arguments.only:
            keep("micro_steps", name, partial(micro_steps, shape, device, rounds))
        if "accumulators" in arguments.only:
            keep("accumulators", name, partial(accumulators, shape, device, rounds))
            if name != "1B":  # float64 takes as much as all the rest
                keep("errors", name, partial(errors, shape, device))
        if "graphs" in arguments.only and name != "1B":
            if device.type == "cuda":
                keep("graphs", name, partial(graphs, shape, device, rounds))
            else:
                print("CUDA graphs: left out, this is no GPU")
    if "weights" in arguments.only:
        if device.type == "cuda":
            keep("weights", "linear", partial(weights, device, rounds))
        else:
            print("weights of any size: left out, this is no GPU")


if __name__ == "__main__":
    main()
