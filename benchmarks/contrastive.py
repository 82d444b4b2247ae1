"""A contrastive loss over the whole batch: the library, sentence-transformers' cached loss, and two passes by hand.

    python benchmarks/contrastive.py [--json FILE] [--rounds N] [--threads N]

One encoder (4 layers, width 128, 32 tokens, no dropout) takes 64 pairs in mini-batches of 8, with the loss that
`CachedMultipleNegativesRankingLoss` has by default: a softmax over all second sentences, of cosines times 20. Each way
makes the same update, save the textbook loop's, whose micro-batches see 7 negatives in place of 63. Of each is said

    error    of its gradient, against the whole batch's in float64, relative in the 2-norm
    time     as a multiple of sentence-transformers', or of the two passes by hand where that is not installed
    peak     live bytes of tensors in one update, besides what is there before it

Two passes run every forward twice and hold the activations of one mini-batch. The library keeps graphs while they fit,
and can be told to keep none. A mini-batch of sentence-transformers is 8 sentences of one side, the library's 8 pairs;
with "half the pairs" a forward has as many sentences as there.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import write_results
from _loops import Batch, Job, error, exact_gradient, gradient_of, is_installed, pieces, textbook
from _timing import Loop, measure
from torch import Tensor, nn
from two_pass import Transformer

import gradaccum as ga
from gradaccum.memory.live_bytes import measured_peak

PAIRS, MINI_BATCH, TOKENS, WORDS = 64, 8, 32, 1000
SCALE = 20.0


def forward(model: nn.Module, pairs: Batch) -> Batch:
    first, second = model(torch.cat(pairs)).chunk(2)  # both sides in one call
    return first, second


def ranking_loss(embeddings: Batch, pairs: Batch) -> Tensor:
    first, second = (F.normalize(one, dim=1) for one in embeddings)
    return F.cross_entropy(SCALE * first @ second.T, torch.arange(len(first)))


def make_job(pairs: int = PAIRS, tokens: int = TOKENS) -> Job:
    torch.manual_seed(0)
    model = Transformer()
    ids = torch.randint(WORDS, (2, pairs, tokens))
    return Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        loss_fn=lambda model, batch: ranking_loss(forward(model, batch), batch),
        micro_batches=pieces((ids[0], ids[1]), MINI_BATCH),
    )


class OfFeatures(nn.Module):
    """The encoder as sentence-transformers calls it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.encoder(features["input_ids"])}


def sentence_transformers(job: Job) -> Loop:
    """https://sbert.net/docs/package_reference/sentence_transformer/losses.html#cachedmultiplenegativesrankingloss"""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[OfFeatures(job.model)], device="cpu")
    loss_fn = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=MINI_BATCH)
    features = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.batch()]

    def update() -> None:
        loss_fn(features, None).backward()
        job.optimizer.step()
        job.optimizer.zero_grad()

    return update


def by_hand(job: Job) -> Loop:
    """Gao et al., Scaling deep contrastive learning batch size under memory limited setup, 2021, section 3.2."""

    def update() -> None:
        with torch.no_grad():
            outputs = [forward(job.model, pairs) for pairs in job.micro_batches]
        leaves = [torch.cat(column).requires_grad_() for column in zip(*outputs, strict=True)]
        ranking_loss((leaves[0], leaves[1]), job.batch()).backward()
        gradients = [leaf.grad.split(MINI_BATCH) for leaf in leaves if leaf.grad is not None]
        for pairs, *gradient in zip(job.micro_batches, *gradients, strict=True):
            torch.autograd.backward(forward(job.model, pairs), gradient)
        job.optimizer.step()
        job.optimizer.zero_grad()

    return update


def ours(job: Job, kept_graphs: int | None, pairs: int = MINI_BATCH) -> Loop:
    step = ga.TrainStep(
        job.model,
        job.optimizer,
        forward=forward,
        batch_loss=ranking_loss,
        micro_batch_size=pairs,
        kept_graphs=kept_graphs,
    )
    batch = job.batch()
    return lambda: step(batch)


def loops_of(job: Job) -> dict[str, Loop]:
    name = "sentence-transformers"
    theirs = {name: sentence_transformers(job)} if is_installed("sentence_transformers", name) else {}
    return theirs | {
        "two passes by hand": by_hand(job),
        "gradaccum, none kept": ours(job, 0),
        "gradaccum, none kept, half the pairs": ours(job, 0, MINI_BATCH // 2),
        "gradaccum, what fits": ours(job, None),
        "whole batch": textbook(job.cut(len(job.batch()[0]))),
        "textbook loop": textbook(job),
    }


def peak_bytes(loop: Loop) -> int:
    with measured_peak(torch.device("cpu")) as memory:
        loop()
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job = make_job(arguments.pairs, arguments.tokens)
    loops, exact = loops_of(job), exact_gradient(job)
    errors = {name: error(gradient_of(job, loop), exact) for name, loop in loops.items()}
    peaks = {name: peak_bytes(loop) for name, loop in loops.items()}
    results: dict[str, Any] = {}
    print(f"{arguments.pairs} pairs in mini-batches of {MINI_BATCH}: error of the gradient, time, peak")
    for name, times in measure(loops, arguments.rounds).items():
        results[name] = asdict(times) | {"error": errors[name], "peak_bytes": peaks[name]}
        print(
            f"  {name:36} {errors[name]:8.0e}   {times.seconds:6.3f} s   {times.ratio:5.2f}"
            f"   {peaks[name] / 2**20:6.1f} MiB"
        )
    if arguments.json:
        write_results(
            arguments.json,
            {"pairs": arguments.pairs, "mini_batch": MINI_BATCH, "base": next(iter(loops)), "loops": results},
        )


if __name__ == "__main__":
    main()
