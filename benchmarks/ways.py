"""Does the plan name the way to fit that is the fastest, and does each way take what is said of it?

    python benchmarks/ways.py [--quick] [--only NAME ...] [--rounds 5] [--seconds 60] [--json FILE]

Five networks (`_nets`) are planned for two budgets each, one that a few samples fit into and one that not even a single
one does. Then everything is tried: `TrainStep` in every way and micro-batch size whose counted peak is within the
budget, by turns. Written down are the time of what the plan has named first, of the fastest there is, and how far the
estimates without a device are from the peaks.
"""

from __future__ import annotations

import argparse
import functools
import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _common import write_results
from _nets import NETS, Net
from _timing import measure
from torch import nn

import gradaccum as ga
from gradaccum import tree
from gradaccum.fit.estimate import estimate
from gradaccum.fit.planner import _size_model, default_sizes
from gradaccum.fit.ways import Way, ways_besides
from gradaccum.fit.workload import Workload
from gradaccum.memory.live_bytes import LiveBytes

Trial = tuple[Way, int]  # and the micro-batch size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, one round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks whose names have this in them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="that a plan may take")
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.only, arguments.rounds, arguments.seconds = ["ResNet"], 1, 5.0
    warnings.simplefilter("ignore", ga.GradAccumWarning)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, net in NETS.items():
        if arguments.only is None or any(part in name for part in arguments.only):
            results[name] = planned(name, net, rounds=arguments.rounds, max_seconds=arguments.seconds)
    if arguments.json:
        write_results(arguments.json, {"rounds": arguments.rounds, "networks": results})


def planned(name: str, net: Net, *, rounds: int, max_seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = net.make(), net.batch(net.rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # every update is of the same parameters
    peaks, apart = peaks_of_all(model, net, batch, optimizer)
    alone, resident = peaks[Way(), 1], 2 * sum(parameter.nbytes for parameter in model.parameters())
    budgets = {"some samples fit": peaks[Way(), 2] + 1, "none fits": resident + round(0.75 * (alone - resident))}
    print(f"{name}: estimates at most {apart:.3f} off")
    found: dict[str, Any] = {"estimates_off_by": apart}
    for which, budget in budgets.items():
        options: dict[str, Any] = {"optimizer": optimizer, "memory": budget, "max_seconds": max_seconds}
        plan = ga.plan(model, net.loss_fn, batch, **options)
        trials = {trial: peak for trial, peak in peaks.items() if peak <= budget}
        first = plan.ways[0]
        named = next(trial for trial in peaks if trial[0].words == first.words and trial[1] >= first.micro_batch_size)
        named = (named[0], first.micro_batch_size)
        loops = {trial: loop_of(*trial, model, net, batch, optimizer) for trial in {named: 0, **trials}}
        times = measure({str(trial): loop for trial, loop in loops.items()}, rounds)
        seconds = {trial: times[str(trial)].seconds for trial in loops}
        best = min(seconds, key=lambda trial: seconds[trial])
        ratio = times[str(named)].ratio / times[str(best)].ratio
        print(f"  {which}: named {in_words(named)}, the fastest is {in_words(best)}: {ratio:.2f} of its time")
        found[which] = {
            "budget": budget,
            "named": {"way": in_words(named), "seconds": seconds[named], "peak_bytes": first.peak_bytes},
            "fastest": {"way": in_words(best), "seconds": seconds[best]},
            "ratio": ratio,
            "all": {in_words(trial): {"seconds": seconds[trial], "peak_bytes": peaks.get(trial)} for trial in loops},
        }
    return found


def peaks_of_all(
    model: nn.Module, net: Net, batch: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[Trial, int], float]:
    """Counted peaks of updates, by way and size; and the largest relative error of an estimate of one."""
    workload = Workload.checked(model, net.loss_fn, batch, forward=None, batch_loss=None, optimizer=optimizer)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *tree.tensors(batch)])
    peaks: dict[Trial, int] = {}
    apart = 0.0
    for way in [Way(), *ways_besides(workload, workload.device)]:
        sizes = default_sizes(net.rows)
        guess = _size_model(workload, workload.device, sizes, memory=None, looks_between=False)
        try:
            estimate(workload, guess, target=workload.device, way=way)
        except ga.UnsupportedError:
            continue
        for size in sizes:
            loop = loop_of(way, size, model, net, batch, optimizer)
            loop()
            gc.collect()
            with LiveBytes() as live:
                loop()
            peaks[way, size] = live.peak + held
            apart = max(apart, abs(guess.curve().at(size) / peaks[way, size] - 1))
    return peaks, apart


def loop_of(
    way: Way, size: int, model: nn.Module, net: Net, batch: Any, optimizer: torch.optim.Optimizer
) -> Callable[[], object]:
    options: dict[str, Any] = {"activations": way.activations, "micro_batch_size": size, "check": "off"}
    step = ga.TrainStep(model, optimizer, net.loss_fn, **options)
    return functools.partial(_run, step, model, batch, way.chunk)


def _run(step: ga.TrainStep, model: nn.Module, batch: Any, chunk: int | None) -> None:
    with nullcontext() if chunk is None else ga.chunked_head(model, size=chunk):
        step(batch)


def in_words(trial: Trial) -> str:
    return f"{trial[0].words}, micro-batches of {trial[1]}"


if __name__ == "__main__":
    main()
