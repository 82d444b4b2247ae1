"""Time per micro-step of the loop in the README: the library against the textbook loop, and against peers.

    python benchmarks/overhead.py [--json FILE]

The job is the smallest there is, so that what is measured is the loop and nothing else: Linear(2, 1), 1,000 samples,
micro-batches of 10, an update every 4, SGD. The library's loops are written as in the README, `ga.criterion` included.
A second job, a network whose micro-step takes about a millisecond, shows what is left of the difference in a real one.
A run is 12 passes over the data. Runs of all loops alternate, and the median of each loop's ratios to the textbook loop
of the same round is what is compared. Run it on an idle machine.

`TrainStep` is given whole batches and cuts them itself, so it is compared with a textbook loop that does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import write_results
from _loops import PEERS, is_installed
from _timing import measure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

PASSES = 12
ROUNDS = 41
SAMPLES, MICRO_BATCH, ACCUM_ITER = 1000, 10, 4

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer, nn.Module]]


def data() -> Batches:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 2, generator=generator)
    y = x @ torch.tensor([[-2.0], [3.4]]) + 4.2 + 0.01 * torch.randn(SAMPLES, 1, generator=generator)
    return list(DataLoader(TensorDataset(x, y), batch_size=MICRO_BATCH))


def job() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()


def millisecond_job() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    torch.manual_seed(0)
    hidden = [layer for _ in range(6) for layer in (nn.Tanh(), nn.Linear(320, 320))]
    model = nn.Sequential(nn.Linear(2, 320), *hidden, nn.Tanh(), nn.Linear(320, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()


def textbook(batches: Batches, make: Make | None = None) -> None:
    model, optimizer, criterion = (make or job)()
    for _ in range(PASSES):
        running = 0.0
        for i, (x, y) in enumerate(batches):
            loss = criterion(model(x), y) / ACCUM_ITER
            running += loss.item()
            loss.backward()
            if (i + 1) % ACCUM_ITER == 0 or i + 1 == len(batches):
                optimizer.step()
                optimizer.zero_grad()


def textbook_that_cuts(batches: Batches) -> None:
    """The same for a loader of whole batches."""
    model, optimizer, criterion = job()
    size = MICRO_BATCH * ACCUM_ITER
    xs, ys = (torch.cat(column) for column in zip(*batches, strict=True))
    for _ in range(PASSES):
        running = 0.0
        for start in range(0, len(xs), size):
            x, y = xs[start : start + size], ys[start : start + size]
            for i in range(0, len(x), MICRO_BATCH):
                loss = criterion(model(x[i : i + MICRO_BATCH]), y[i : i + MICRO_BATCH]) / ACCUM_ITER
                running += loss.item()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def forward_and_backward(batches: Batches) -> None:
    """What no loop can do without."""
    model, _, criterion = job()
    for _ in range(PASSES):
        for x, y in batches:
            criterion(model(x), y).backward()


def accumulator(batches: Batches, make: Make | None = None, *, reads_loss: bool = True) -> None:
    model, optimizer, criterion = (make or job)()
    criterion = ga.criterion(criterion)
    accumulator = ga.Accumulator(model, optimizer, batch_size=MICRO_BATCH * ACCUM_ITER)
    for _ in range(PASSES):
        running = 0.0
        for x, y in accumulator.over(batches):
            update = accumulator.backward(criterion(model(x), y))
            if update and reads_loss:
                running += update.loss.item()


def accumulator_loss_unread(batches: Batches) -> None:
    accumulator(batches, reads_loss=False)


def train_step(batches: Batches) -> None:
    model, optimizer, criterion = job()
    criterion = ga.criterion(criterion)
    step = ga.TrainStep(
        model, optimizer, lambda model, batch: criterion(model(batch[0]), batch[1]), micro_batch_size=MICRO_BATCH
    )
    size = MICRO_BATCH * ACCUM_ITER
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    for _ in range(PASSES):
        running = 0.0
        for i in range(0, len(x), size):
            running += step((x[i : i + size], y[i : i + size])).loss.item()


def accelerate(batches: Batches) -> None:
    from accelerate import Accelerator

    model, optimizer, criterion = job()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUM_ITER)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(PASSES):
        running = 0.0
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                running += loss.item()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


def fabric(batches: Batches) -> None:
    from lightning.fabric import Fabric

    model, optimizer, criterion = job()
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, optimizer)
    for _ in range(PASSES):
        running = 0.0
        for i, (x, y) in enumerate(batches):
            is_accumulating = (i + 1) % ACCUM_ITER != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                loss = criterion(model(x), y) / ACCUM_ITER
                running += loss.item()
                fabric.backward(loss)
            if not is_accumulating:
                optimizer.step()
                optimizer.zero_grad()


LOOPS: dict[str, Callable[[Batches], None]] = {
    "textbook loop": textbook,
    "textbook loop that cuts": textbook_that_cuts,
    "forward and backward alone": forward_and_backward,
    "gradaccum Accumulator": accumulator,
    "gradaccum Accumulator, loss unread": accumulator_loss_unread,
    "gradaccum TrainStep": train_step,
    "textbook loop, a millisecond": partial(textbook, make=millisecond_job),
    "gradaccum Accumulator, a millisecond": partial(accumulator, make=millisecond_job),
    "Lightning Fabric": fabric,
    "Accelerate": accelerate,
}

TEXTBOOK = "textbook loop"
BASES = {
    "gradaccum TrainStep": "textbook loop that cuts",
    "textbook loop, a millisecond": "textbook loop, a millisecond",
    "gradaccum Accumulator, a millisecond": "textbook loop, a millisecond",
}
"""What a loop is compared with, where that is not the textbook loop."""


def timed(loops: dict[str, Callable[[Batches], None]], rounds: int) -> dict[str, dict[str, float]]:
    batches = data()
    times = measure({name: partial(loop, batches) for name, loop in loops.items()}, rounds, bases=BASES, warm_up=2)
    steps = PASSES * len(batches)
    return {name: {"microseconds": of.seconds / steps * 1e6, "ratio": of.ratio} for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loops = dict(LOOPS)
    for name, package in PEERS.items():
        if not is_installed(package, name):
            del loops[name]
    results = timed(loops, arguments.rounds)
    for name, result in results.items():
        print(f"{name:36} {result['microseconds']:7.1f} us   {result['ratio']:5.2f} of the {BASES.get(name, TEXTBOOK)}")
    if arguments.json:
        write_results(arguments.json, {"loops": results})


if __name__ == "__main__":
    main()
