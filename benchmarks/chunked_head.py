"""What does the head of a large vocabulary cost in chunks of tokens, in time and in memory?

    python benchmarks/chunked_head.py [--quick] [--device cuda] [--vocabulary 32000] [--features 256] [--tokens 128]
                                      [--samples 16] [--chunk 64] [--rounds 5] [--json FILE]

An embedding, blocks of two layers and a head train on cross entropy. The batch runs in one piece and in pieces of one
sample; each with the head in one piece, in chunks by this library, in chunks by torch (2.13), and in chunks with the
blocks recomputed. An update without the optimizer's step is timed; peak memory, counted in a run of its own, is what
the update takes besides what is there before: gradients, activations, temporaries. Gradients are compared with those of
the batch in one piece.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _timing import measure
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.losses.torch_losses import HAS_LINEAR_CROSS_ENTROPY
from gradaccum.memory.live_bytes import measured_peak

BLOCKS = 4
Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
              for _ in range(BLOCKS))
        )  # fmt: skip
        self.lm_head = nn.Linear(features, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.embedding(ids))


def losses(chunk: int) -> dict[str, Callable[[Any, Batch], ga.Loss]]:
    """The head in one piece, in our chunks, and in torch's."""
    criterion = ga.criterion(nn.CrossEntropyLoss())

    def one_piece(model: Any, batch: Batch) -> ga.Loss:
        return criterion(model.lm_head(model(batch[0])).flatten(0, 1), batch[1].flatten())

    def chunked(model: Any, batch: Batch) -> ga.Loss:
        in_chunks = ga.criterion(nn.CrossEntropyLoss(), head=model.lm_head, chunk=chunk)
        return in_chunks(model(batch[0]), batch[1])

    found = {"one piece": one_piece, "chunks": chunked}
    if HAS_LINEAR_CROSS_ENTROPY:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        linear_cross_entropy = ga.criterion(F.linear_cross_entropy)

        def by_torch(model: Any, batch: Batch) -> ga.Loss:
            hidden = model(batch[0]).flatten(0, 1)
            return linear_cross_entropy(hidden, model.lm_head.weight, batch[1].flatten(), options=options)

        found["torch's chunks"] = by_torch
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--device", default="cpu")
    for name, default in (("vocabulary", 32000), ("features", 256), ("tokens", 128), ("samples", 16), ("chunk", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the results are written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.vocabulary, arguments.features, arguments.samples, arguments.rounds = 4000, 64, 4, 2
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(arguments.vocabulary, arguments.features).to(device)
    shape = (arguments.samples, arguments.tokens)
    batch: Any = tuple(torch.randint(arguments.vocabulary, shape, device=device) for _ in range(2))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # every update is of the same parameters
    loops: dict[str, Callable[[], object]] = {}
    for size, pieces in ((arguments.samples, "whole batch"), (1, "pieces of one")):
        for name, loss in losses(arguments.chunk).items():
            step = ga.TrainStep(model, optimizer, loss, micro_batch_size=size)
            loops[f"{pieces}, {name}"] = lambda step=step: step(batch)
        options: dict[str, Any] = {"micro_batch_size": size, "activations": "recompute"}
        again = ga.TrainStep(model, optimizer, losses(arguments.chunk)["chunks"], **options)
        loops[f"{pieces}, chunks, recomputed"] = lambda step=again: step(batch)

    gradients = {name: gradient_of(model, optimizer, loop) for name, loop in loops.items()}
    whole = next(iter(gradients.values()))
    errors = {name: ((found - whole).norm() / whole.norm()).item() for name, found in gradients.items()}
    del gradients, whole
    times = measure(loops, arguments.rounds, device=device)
    peaks: dict[str, int] = {}
    for name, loop in loops.items():
        gc.collect()
        with measured_peak(device) as memory:
            loop()
        peaks[name] = memory.peak
    gradient = 4 * sum(parameter.numel() for parameter in model.parameters())
    logits = 4 * shape[1] * arguments.vocabulary
    print(f"gradients {gradient / 2**20:.0f} MiB, logits of a sample {logits / 2**20:.0f} MiB")
    for name, of in times.items():
        print(f"{name:32} time {of.ratio:5.2f}  peak {peaks[name] / 2**20:7.1f} MiB  error {errors[name]:.1e}")
    if arguments.json:
        asked = {name: value for name, value in vars(arguments).items() if name != "json"}
        found = {name: {**asdict(of), "peak_bytes": peaks[name], "error": errors[name]} for name, of in times.items()}
        write_results(arguments.json, {**asked, "gradient_bytes": gradient, "loops": found})


def gradient_of(model: Model, optimizer: torch.optim.Optimizer, loop: Callable[[], object]) -> Tensor:
    """The gradient of the head that an update steps with."""
    seen: list[Tensor | None] = []
    hook = optimizer.register_step_pre_hook(lambda *_: seen.append(model.lm_head.weight.grad))
    loop()
    hook.remove()
    assert seen[0] is not None
    return seen[0].double().cpu()


if __name__ == "__main__":
    main()
