"""Batches in the layouts that people have: each with a model, a loss that knows its weight, and how it is cut."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

N = 7  # samples in all of them; a prime, so that pieces are ragged
WIDTH = 4


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def counts(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


class Net(nn.Module):
    """Layers enough for all of them, none of which couples samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.conv, self.bag, self.words = nn.Conv2d(3, WIDTH, 3), nn.EmbeddingBag(11, WIDTH), nn.Embedding(11, WIDTH)
        self.double()

    def unused(self) -> Tensor:
        """So that all parameters have a gradient, in every layout."""
        return sum((0 * parameter.sum() for parameter in self.parameters()), torch.zeros(()))


@dataclass(frozen=True, kw_only=True)
class Layout:
    make: Callable[[], Any]
    loss_fn: Callable[[Any, Any], Any]
    split: Callable[[], ga.Split] = ga.split_by_samples
    together: int = 1  # samples that are never cut apart
    needs_split: bool = field(default=False)


def mean(losses: Tensor, model: Net) -> ga.Loss:
    return ga.Loss.mean(losses.mean() + model.unused(), over=len(losses))


def of_pictures(model: Net, pictures: Any) -> Tensor:
    return torch.stack([model.conv(one[None]).tanh().mean((0, 2, 3)) for one in pictures])


def detection(model: Net, batch: Any) -> ga.Loss:
    features = of_pictures(model, batch[0])
    losses = [
        (model.linear(one).sum() - target["boxes"]).square().sum()
        for one, target in zip(features, batch[1], strict=True)
    ]
    return mean(torch.stack(losses), model)


def ocr(model: Net, batch: Any) -> ga.Loss:
    pictures, texts = batch
    features = of_pictures(model, pictures)
    targets = torch.tensor([float(sum(map(ord, text))) / 100 for text in texts], dtype=torch.float64)
    return mean((model.linear(features).sum(1) - targets).square(), model)


def speech(model: Net, batch: Any) -> ga.Loss:
    clips, labels = batch
    logits = torch.stack([model.out(clip.T[:, :WIDTH]).tanh().amax(0) for clip in clips])
    return mean(F.cross_entropy(logits, torch.tensor(labels), reduction="none"), model)


def ctc(model: Net, batch: Any) -> ga.Loss:
    log_probs = model.out(batch["x"]).log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(
        log_probs, batch["targets"], torch.full((len(batch["x"]),), 9), batch["lengths"], reduction="none"
    )
    return mean(losses, model)


def bags(model: Net, batch: Any) -> ga.Loss:
    offsets = batch["lengths"].cumsum(0) - batch["lengths"]
    return mean((model.bag(batch["words"], offsets) * batch["y"][:, None]).tanh().sum(1), model)


def graphs(model: Net, batch: Any) -> ga.Loss:
    source, target = batch["edge_index"]
    hidden = torch.zeros_like(batch["x"]).index_add(0, target, model.linear(batch["x"])[source]).tanh()
    of_graph = torch.zeros(len(batch["y"]), WIDTH, dtype=torch.float64).index_add(0, batch["graph"], hidden)
    return mean((of_graph.sum(1) - batch["y"]).square(), model)


def packed(model: Net, batch: Any) -> ga.Loss:
    hidden, states, state = model.words(batch["input_ids"][0]), [], torch.zeros(WIDTH, dtype=torch.float64)
    for token, position in zip(hidden, batch["position_ids"][0].tolist(), strict=True):  # starts anew at each sequence
        state = token + (0 if position == 0 else 0.9 * state)
        states.append(state)
    return ga.Loss.sum(torch.stack(states).square().sum() + 0 * model.unused(), over=len(states))


def rope(model: Net, batch: Any) -> ga.Loss:
    phase = batch["position_ids"].sum(0)[..., None] * batch["frequencies"]
    return mean((model.words(batch["input_ids"]) * phase.cos()).cumsum(1).tanh().square().mean((1, 2)), model)


def patches(model: Net, batch: Any) -> ga.Loss:
    text = model.words(batch["input_ids"]).mean(1)
    sample = torch.repeat_interleave(torch.arange(len(text)), batch["num_patches"])
    seen = torch.zeros_like(text).index_add(0, sample, model.linear(batch["pixel_values"]).tanh())
    return mean((text * seen).sum(1).tanh(), model)


def half_labelled(model: Net, batch: Any) -> ga.Loss:
    supervised = F.cross_entropy(model.out(batch["labelled"]), batch["y"], reduction="none")
    consistency = model.out(batch["unlabelled"]).tanh().square().mean(1)  # 3 for each of the labelled ones
    return mean(supervised + consistency.reshape(-1, 3).mean(1), model)


def components(model: Net, batch: Any) -> ga.Loss:
    return mean(
        torch.stack(
            [model.linear(one).tanh().sum() * y for one, y in zip(batch["x"].unbind(), batch["y"], strict=True)]
        ),
        model,
    )


def dicts(model: Net, batch: Any) -> ga.Loss:
    return mean(torch.stack([model.words(sample["ids"]).cumsum(0).tanh().square().mean() for sample in batch]), model)


def preferences(model: Net, batch: Any) -> ga.Loss:
    chosen, rejected = model.words(batch["input_ids"]).tanh().mean((1, 2)).chunk(2)
    losses = -F.logsigmoid(chosen - rejected)
    return ga.Loss.mean(losses.mean() + model.unused(), over=len(losses))


def group_relative(model: Net, batch: Any) -> ga.Loss:
    scores = model.words(batch["input_ids"]).tanh().mean((1, 2)).reshape(-1, 3)
    advantage = batch["reward"].reshape(-1, 3)
    advantage = (advantage - advantage.mean(1, keepdim=True)) / (advantage.std(1, keepdim=True) + 0.1)
    losses = (scores.softmax(1) * advantage).sum(1)
    return ga.Loss.mean(losses.mean() + model.unused(), over=len(losses))


class ByGraphs:
    """Cuts a batch of graphs, whose edges are numbers of nodes of the whole batch."""

    unit = "graphs"

    def rows(self, batch: Any) -> int:
        return len(batch["y"])

    def largest(self, batch: Any) -> int:
        return self.rows(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> list[Tensor]:
        size = size if max_rows is None else min(size, max_rows)
        return list(torch.arange(self.rows(batch)).split(size))

    def cut(self, batch: Any, rows: Any) -> Any:
        rows = torch.arange(self.rows(batch))[rows]
        nodes = torch.isin(batch["graph"], rows)
        new = nodes.cumsum(0) - 1
        edges = batch["edge_index"][:, nodes[batch["edge_index"][0]]]
        return {"x": batch["x"][nodes], "edge_index": new[edges],
                "graph": torch.searchsorted(rows, batch["graph"][nodes]), "y": batch["y"][rows]}  # fmt: skip


def graph_batch() -> Any:
    sizes = [3, 5, 2, 4, 1, 6, 3]
    start, edges = 0, []
    for size in sizes:
        edges += [torch.randint(start, start + size, (2, 2 * size))]
        start += size
    return {"x": randn(start, WIDTH), "edge_index": torch.cat(edges, 1),
            "graph": torch.repeat_interleave(torch.arange(N), torch.tensor(sizes)), "y": randn(N)}  # fmt: skip


LENGTHS = [3, 5, 2, 4, 1, 6, 3]
TOKENS = sum(LENGTHS)

LAYOUTS: dict[str, Layout] = {
    "detection": Layout(
        make=lambda: ([randn(3, 5 + i, 9 - i) for i in range(N)], [{"boxes": randn(n, 4)} for n in LENGTHS]),
        loss_fn=detection,
    ),
    "text in pictures": Layout(
        make=lambda: ([randn(3, 5, 6 + i) for i in range(N)], ["a", "b b", "c", "dd", "e", "f f f", "g"]), loss_fn=ocr
    ),
    "speech": Layout(make=lambda: ([randn(8, 6 + n) for n in LENGTHS], [0, 1, 2, 0, 1, 2, 0]), loss_fn=speech),
    "CTC": Layout(
        make=lambda: {
            "x": randn(N, 9, WIDTH),
            "targets": torch.randint(1, 3, (18,)),
            "lengths": counts(1, 4, 2, 3, 1, 4, 3),
        },
        loss_fn=ctc,
        split=lambda: ga.split_by_samples(axes={"targets": lambda batch: batch["lengths"]}),
        needs_split=True,
    ),
    "EmbeddingBag": Layout(
        make=lambda: {"words": torch.randint(11, (TOKENS,)), "lengths": counts(*LENGTHS), "y": randn(N)},
        loss_fn=bags,
        split=lambda: ga.split_by_samples(axes={"words": lambda batch: batch["lengths"]}),
        needs_split=True,
    ),
    "graphs": Layout(make=graph_batch, loss_fn=graphs, split=ByGraphs, needs_split=True),
    "packed text": Layout(
        make=lambda: {
            "input_ids": torch.randint(11, (1, TOKENS)),
            "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        },
        loss_fn=packed,
        split=ga.split_packed,
        needs_split=True,
    ),
    "M-RoPE": Layout(
        make=lambda: {
            "input_ids": torch.randint(11, (N, 6)),
            "position_ids": torch.randint(9, (3, N, 6)).double(),
            "frequencies": randn(WIDTH),
        },
        loss_fn=rope,
        split=lambda: ga.split_by_samples(axes={"position_ids": 1, "frequencies": None}),
        needs_split=True,
    ),
    "image patches": Layout(
        make=lambda: {
            "input_ids": torch.randint(11, (N, 6)),
            "pixel_values": randn(17, WIDTH),
            "num_patches": counts(4, 0, 2, 6, 0, 1, 4),
        },
        loss_fn=patches,
        split=lambda: ga.split_by_samples(axes={"pixel_values": lambda batch: batch["num_patches"]}),
        needs_split=True,
    ),
    "labelled and unlabelled": Layout(
        make=lambda: {"labelled": randn(N, WIDTH), "y": torch.randint(3, (N,)), "unlabelled": randn(3 * N, WIDTH)},
        loss_fn=half_labelled,
        split=lambda: ga.split_by_samples(axes={"unlabelled": lambda batch: torch.full((len(batch["y"]),), 3)}),
        needs_split=True,
    ),
    "nested tensor": Layout(
        make=lambda: {"x": torch.nested.nested_tensor([randn(n, WIDTH) for n in LENGTHS]), "y": randn(N)},
        loss_fn=components,
    ),
    "jagged tensor": Layout(
        make=lambda: {
            "x": torch.nested.nested_tensor([randn(n, WIDTH) for n in LENGTHS], layout=torch.jagged),
            "y": randn(N),
        },
        loss_fn=components,
    ),
    "a list of dicts": Layout(make=lambda: [{"ids": torch.randint(11, (5,))} for _ in range(N)], loss_fn=dicts),
    "pairs": Layout(
        make=lambda: {"input_ids": torch.randint(11, (14, 5))},
        loss_fn=preferences,
        split=lambda: ga.split_by_samples(groups=lambda batch: torch.arange(len(batch["input_ids"]) // 2).repeat(2)),
        together=2,
        needs_split=True,
    ),
    "completions of a prompt": Layout(
        make=lambda: {
            "input_ids": torch.randint(11, (21, 5)),
            "reward": randn(21),
            "prompt": torch.arange(7).repeat_interleave(3),
        },
        loss_fn=group_relative,
        split=lambda: ga.split_by_samples(groups=lambda batch: batch["prompt"]),
        together=3,
        needs_split=True,
    ),
}


def whole_gradient(layout: Layout, model: Net, batch: Any) -> Tensor:
    model.zero_grad()
    layout.loss_fn(model, batch).value.backward()
    return taken_gradient(model)


def taken_gradient(model: Net) -> Tensor:
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    model.zero_grad()
    return found
