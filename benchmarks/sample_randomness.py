"""What does it cost that dropout belongs to samples (`randomness="sample"`), in time and in memory?

    python benchmarks/sample_randomness.py [--quick] [--device cuda] [--shape 124M] [--rows 4] [--micro 2]
                                           [--tokens 128] [--rounds 5] [--json FILE]

GPT-2 with its own dropout (embedding, attention weights, both branches of a block; 0.1) makes updates with plain SGD:
with torch's dropout, with the samples' own, and without any. Times are ratios to torch's within a round; peak memory is
counted in a run of its own, over what is there before.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _gpt import GPT, SHAPES, Block, loss_fn, make_batch
from _timing import measure
from torch import Tensor

import gradaccum as ga
from gradaccum.memory.live_bytes import measured_peak

DROPOUT = 0.1


class DroppingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        rows, time, width = x.shape
        chance = DROPOUT if self.training else 0.0
        parts = self.attention(self.before_attention(x)).view(rows, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=chance)
        x = x + F.dropout(self.projection(mixed.transpose(1, 2).reshape(rows, time, width)), chance)
        return x + F.dropout(self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh")), chance)


class DroppingGPT(GPT):
    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(F.dropout(x, DROPOUT, self.training))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="124M")
    for name, default in (("rows", 4), ("micro", 2), ("tokens", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where the results are written")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.tokens, options.rounds = "tiny", 8, 2
    shape, device = SHAPES[options.shape], torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DroppingGPT(shape)
    for number, block in enumerate(model.blocks):
        dropping: Any = DroppingBlock(shape)
        dropping.load_state_dict(block.state_dict())
        model.blocks[number] = dropping
    model.to(device)
    batch = make_batch(shape, options.rows, options.tokens)

    def step(randomness: Any) -> ga.TrainStep:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        return ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=options.micro, randomness=randomness)

    def run(train_step: ga.TrainStep, *, training: bool = True) -> Any:
        def update() -> None:
            model.train(training)
            train_step(batch)

        return update

    by_torch, by_sample = step("torch"), step("sample")
    loops = {"torch": run(by_torch), "sample": run(by_sample), "no dropout": run(by_torch, training=False)}
    times = measure(loops, options.rounds, device=device)
    peaks: dict[str, int] = {}
    for name, loop in loops.items():
        gc.collect()
        with measured_peak(device) as memory:
            loop()
        peaks[name] = memory.peak
    for name, time in times.items():
        print(
            f"{name:12} {time.seconds:8.3f} s  {time.ratio:5.2f} of torch's, processor {time.processor_ratio:5.2f}"
            f"  peak {peaks[name] / 2**20:8.1f} MiB  {peaks[name] / peaks['torch']:5.3f}"
        )
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        found = {name: {**asdict(time), "peak_bytes": peaks[name]} for name, time in times.items()}
        write_results(options.json, {**asked, "loops": found})


if __name__ == "__main__":
    main()
