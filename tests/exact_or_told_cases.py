"""Losses, layers and states as people train with them, and what becomes of each: exact, told, or not seen.

A row makes everything anew. `KINDS` says in the words of docs/exact.md what its rows are, and what is to be expected of
`TrainStep` and of `Accumulator`; the test holds both against plain torch.
"""

# ruff: noqa: E501  # a row of the table is a line

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga

ROWS, FEATURES, CLASSES, LENGTH = 22, 5, 4, 6
SIZE = 8  # of micro-batches: 8, 7, 7
IGNORED = -100

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Rows that end alike, as one line of the docs.

    Attributes:
        what: they are.
        step: what `TrainStep` does: "exact", "error", "warning", "not checked" or "silent".
        loop: what `Accumulator` does: "exact", "error", "warning" or "silent"; "asks" is a warning although it is exact.
    """

    what: str
    step: str
    loop: str


KINDS: dict[str, Kind] = {
    "sample mean": Kind(what="a mean over samples, however it is made", step="exact", loop="exact"),
    "declared": Kind(what="a mean or a sum that says what it is over", step="exact", loop="exact"),
    "coupled, told": Kind(what="a loss of the whole batch in `batch_loss=`", step="exact", loop="-"),
    "opaque mean": Kind(what="a mean over samples that the graph does not show", step="exact", loop="asks"),
    "random": Kind(what="draws for each sample: dropout, noise, latents", step="exact", loop="exact"),
    "mean": Kind(what="a mean over labels, a mask or class weights, undeclared", step="error", loop="error"),
    "opaque": Kind(what="the same compiled, fused, clamped or checkpointed", step="error", loop="warning"),
    "sum": Kind(what="a sum that is taken for a mean", step="error", loop="error"),
    "count": Kind(what="a declared count that is not the loss's", step="error", loop="error"),
    "terms": Kind(what="several means over different things in one tensor", step="error", loop="error"),
    "ratio": Kind(what="a root, a ratio or another function of sums over the batch", step="error", loop="warning"),
    "samples coupled": Kind(what="a loss in which samples meet", step="error", loop="silent"),
    "layer": Kind(what="a layer that looks at the micro-batch, made by hand", step="warning", loop="silent"),
    "batch norm": Kind(what="BatchNorm in training mode, also of other networks", step="warning", loop="warning"),
    "state": Kind(what="a buffer that moves in the forward", step="warning", loop="warning"),
    "hook": Kind(what="a hook on a parameter that clamps", step="warning", loop="warning"),
    "own state": Kind(what="state outside of buffers that moves in the forward", step="warning", loop="silent"),
    "backward": Kind(what="gradients added in the backward", step="warning", loop="silent"),
    "another loss": Kind(what="a loss that differs whenever it is made", step="not checked", loop="silent"),
    "later": Kind(what="what sets in after the first batch", step="silent", loop="silent"),
    "factor": Kind(what="a factor of your own, right or not", step="exact", loop="exact"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry.

    Attributes:
        kind: key of `KINDS`.
        model: makes it.
        loss: makes ``loss_fn``, or what is compared with where ``options`` hold ``batch_loss``.
        batch: makes it.
        options: of the step, made anew.
        is_random: the whole batch draws other numbers than its pieces: what is compared is the auditor's replay.
        loop: where the row differs from its kind in `Accumulator`.
        is_compiled: whether it is compiled besides.
    """

    kind: str
    model: Callable[[], nn.Module]
    loss: Callable[[], Callable[[Any, Any], Any]]
    batch: Callable[[], Any]
    options: Callable[[], dict[str, Any]] = field(default=dict)
    is_random: bool = False
    loop: str | None = None
    is_compiled: bool = False


# ------------------------------------------------------------------------------------------------------------- batches
def tokens() -> Batch:
    ids = torch.randint(1, CLASSES * 2, (ROWS, LENGTH))
    labels = ids.roll(-1, 1)
    for row in range(ROWS):
        labels[row, 1 + row * 3 % LENGTH :] = IGNORED
    return {"ids": ids, "labels": labels, "next": ids.roll(-1, 1)}


def vectors() -> Batch:
    return {
        "x": torch.randn(ROWS, FEATURES),
        "y": torch.arange(ROWS) % CLASSES,
        "t": torch.randn(ROWS, CLASSES),
        "second": torch.randn(ROWS, FEATURES),
        "mask": torch.rand(ROWS, CLASSES) > torch.linspace(0.1, 0.9, ROWS)[:, None],
    }


def sequences() -> Batch:
    return {
        "x": torch.randn(ROWS, LENGTH, FEATURES),
        "y": torch.arange(ROWS) % CLASSES,
        "n": 1 + torch.arange(ROWS) % 5,
    }


def images() -> Batch:
    ink = (torch.rand(ROWS, 1, 8, 8) > torch.linspace(0.3, 0.9, ROWS)[:, None, None, None]).double()
    return {"x": torch.randn(ROWS, 1, 8, 8), "y": torch.arange(ROWS) % CLASSES, "ink": ink}


# -------------------------------------------------------------------------------------------------------------- models
def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 7), *between, nn.Tanh(), nn.Linear(7, CLASSES))


class Gpt(nn.Module):
    """Tied embeddings, causal attention; makes its own loss from labels as Hugging Face's models do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * CLASSES, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True)
        self.register_buffer("causal", torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1), persistent=False)

    def scores(self, ids: Tensor) -> Tensor:
        return self.block(self.table(ids), src_mask=self.causal) @ self.table.weight.T

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(ids).transpose(1, 2), labels, ignore_index=IGNORED)


class ResNet(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms, self.head = nn.ModuleList([norm(), norm()]), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        return self.head((x + self.norms[1](self.second(x))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x).relu()
        coarse = F.interpolate(self.middle(F.max_pool2d(fine, 2)), scale_factor=2.0)
        return self.up(torch.cat([fine, coarse], 1))


class Experts(nn.Module):
    """A mixture of two of three experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, 3)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        return (outputs.gather(-2, chosen[..., None].expand(*chosen.shape, CLASSES)) * shares[..., None]).sum(-2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(FEATURES, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(FEATURES, 6), nn.Linear(3, FEATURES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * (0.5 * log_var).exp()), mean, log_var


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) * (torch.rand(len(x), 1) > 0.3)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Standardized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-3).sqrt()


class Functional(nn.Module):
    """`F.batch_norm` with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("var", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True)


class Deviation(nn.Module):
    """The minibatch standard deviation of progressive GANs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.std(0).mean()


class OverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T / 3).softmax(-1) @ x


class Mixer(nn.Module):
    """A softmax along the wrong dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.softmax(0)


class Capacity(nn.Module):
    """An expert that takes the samples above the micro-batch's average."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        return x * (4 * (scores - scores.mean())).sigmoid()


class Codebook(nn.Module):
    """Vector quantisation with an exponential average for each code (van den Oord et al. 2017)."""

    book: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("book", torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.book).argmin(1)
        quantised = self.book[nearest]
        with torch.no_grad():
            for code in nearest.unique():
                self.book[code].lerp_(x[nearest == code].mean(0), 0.3)
        return x + 0.5 * (quantised - x).detach() * x.sigmoid()


class Centre(nn.Module):
    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.centre).sigmoid()
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return out


class Queue(nn.Module):
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        out = x * (x @ self.queue.clone().T).logsumexp(1, keepdim=True)
        with torch.no_grad():
            self.queue.copy_(torch.cat([x.detach(), self.queue])[:6])
        return out


class Attribute(nn.Module):
    """The same as a centre, in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(7)

    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.centre).sigmoid()
        self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return out


class Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), dtype=gradients[0].dtype)


class Injects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Inject.apply(x, 0.1 * x.square().mean())


class Fused(torch.autograd.Function):
    """What fused kernels look like to the graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def clamped() -> nn.Module:
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.002, 0.002))
    return model


def frozen_statistics() -> nn.Module:
    model = ResNet(lambda: nn.BatchNorm2d(4))
    model.norms.eval()
    return model


def spectral() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.spectral_norm(model[2])
    return model


def gaussian_net() -> nn.Module:
    return nn.Linear(FEATURES, 2 * CLASSES)


# -------------------------------------------------------------------------------------------------------------- losses
def classes(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], **options)


def lm(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["ids"], batch["labels"])


def checkpointed_head(model: nn.Module, batch: Batch) -> Tensor:
    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ model.table.weight.T).transpose(1, 2), labels, ignore_index=IGNORED)

    return checkpoint(loss_of, model.table(batch["ids"]), batch["labels"], use_reentrant=True)


def labels_that_count(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORED).sum()


def token_criterion() -> Any:
    criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=IGNORED))
    return lambda m, b: criterion(m.scores(b["ids"]).transpose(1, 2), b["labels"])


def of(module: nn.Module, target: str = "t") -> Callable[[], Any]:
    return lambda: lambda m, b: module(m(b["x"]), b[target])


def told(module: nn.Module, target: str = "y") -> Callable[[], Any]:
    criterion = ga.criterion(module)
    return lambda: lambda m, b: criterion(m(b["x"]), b[target])


def plain(function: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    return lambda: function


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)


def per_sample(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def focal(model: nn.Module, batch: Batch) -> Tensor:
    loss = per_sample(model, batch)
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def vae(model: nn.Module, batch: Batch) -> Tensor:
    made, mean, log_var = model(batch["x"])
    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
    return ((made - batch["x"]).square().sum(1) + 0.3 * divergence).mean()


def diffusion(model: nn.Module, batch: Batch) -> Tensor:
    x = batch["t"]
    time, noise = torch.rand(len(x), 1), torch.randn_like(x)
    noisy = (1 - time) * x + time * noise
    return F.mse_loss(model(torch.cat([noisy, time], 1)), noise)


def ppo(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch["x"]).log_softmax(-1)
    ratio = (scores.gather(1, batch["y"][:, None])[:, 0] + 1.4).exp()
    advantage = batch["t"][:, 0]
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return (
        policy + 0.5 * (scores[:, 0] - batch["t"][:, 1]).square().mean() + 0.01 * (scores.exp() * scores).sum(1).mean()
    )


def preference(model: nn.Module, batch: Batch) -> Tensor:
    rewards = model(batch["x"])[:, 0]
    pairs = len(rewards) // 2
    return -F.logsigmoid(rewards[: 2 * pairs : 2] - rewards[1 : 2 * pairs : 2]).mean()


def packed(model: nn.Module, batch: Batch) -> ga.Loss:
    state = batch["x"].cumsum(1)
    valid = torch.arange(LENGTH) < batch["n"][:, None]
    loss = F.cross_entropy(model(state).transpose(1, 2), batch["y"][:, None].expand(-1, LENGTH), reduction="none")
    return ga.Loss.sum((loss * valid).sum(), over=valid.sum())


def of_pictures(model: nn.Module, batch: Batch) -> Tensor:
    """RetinaNet's: each picture by its own count."""
    valid = torch.arange(LENGTH) < batch["n"][:, None]
    loss = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"][:, None].expand(-1, LENGTH), reduction="none")
    return ((loss * valid).sum(1) / valid.sum(1)).mean()


def penalty_of_gradients(model: nn.Module, batch: Batch) -> Tensor:
    x = batch["x"].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
    return F.softplus(model(x)[:, 0]).mean() + slope.square().sum(1).mean()


def teacher() -> Any:
    network = nn.Sequential(nn.Linear(FEATURES, CLASSES)).requires_grad_(False)
    return lambda m, b: F.kl_div(m(b["x"]).log_softmax(1), network(b["x"]).softmax(1), reduction="batchmean")


def generator_loss() -> Any:
    judge = nn.Sequential(nn.Linear(CLASSES, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1))
    return lambda m, b: F.softplus(-judge(m(b["x"]))).mean()


def judge_loss() -> Any:
    maker = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
    return lambda m, b: F.softplus(-m(b["x"])[:, 0]).mean() + F.softplus(m(maker(b["second"]))[:, 0]).mean()


def normed_judge_loss() -> Any:
    judge = nn.Sequential(nn.Linear(CLASSES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    return lambda m, b: F.softplus(-judge(m(b["x"]))).mean()


def two_views(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), model(batch["second"])


def info_nce(views: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    one, other = (F.normalize(view, dim=1) for view in views)
    return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


def overlaps(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    ink = model(batch["x"]).sigmoid()
    return {"both": (ink * batch["ink"]).sum(), "all": ink.sum() + batch["ink"].sum()}


def dice(sums: dict[str, Tensor], batch: Any) -> Tensor:
    return 1 - (2 * sums["both"] + 1) / (sums["all"] + 1)


def barlow(views: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    one, other = ((view - view.mean(0)) / view.std(0) for view in views)
    return (one.T @ other / len(one) - torch.eye(CLASSES)).square().sum()


def pearson(model: nn.Module, batch: Batch) -> Tensor:
    one, other = (values - values.mean() for values in (model(batch["x"])[:, 0], batch["t"][:, 0]))
    return 1 - (one * other).sum() / (one.norm() * other.norm())


def hardest(model: nn.Module, batch: Batch) -> Tensor:
    loss = per_sample(model, batch)
    return loss.topk(max(1, len(loss) // 2)).values.mean()


def normalised_advantages(model: nn.Module, batch: Batch) -> Tensor:
    rewards = batch["t"][:, 0]
    return (per_sample(model, batch) * (rewards - rewards.mean()) / (rewards.std() + 1e-6)).mean()


def balance(model: nn.Module, batch: Batch) -> Tensor:
    shares = model.router(batch["x"]).softmax(-1)
    chosen = F.one_hot(shares.argmax(-1), 3).to(shares.dtype)
    return classes(model, batch) + 0.5 * 3 * (shares.mean(0) * chosen.mean(0)).sum()


def discrepancy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]).mean(0) - model(batch["second"]).mean(0)).square().sum()


def mixed_up(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(0.7 * batch["x"] + 0.3 * batch["x"].flip(0)), 0.7 * batch["t"] + 0.3 * batch["t"].flip(0))


def masked(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["t"]).square()[batch["mask"]].mean()


def masked_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["t"]).square() * batch["mask"]).sum() / batch["mask"].sum()


def z_loss(model: nn.Module, batch: Batch) -> Tensor:
    scores = model.scores(batch["ids"])
    loss = F.cross_entropy(scores.transpose(1, 2), batch["labels"], ignore_index=IGNORED)
    return loss + 0.1 * scores.logsumexp(-1).square().mean()


def two_losses(model: nn.Module, batch: Batch) -> dict[str, ga.Loss]:
    scores = model.scores(batch["ids"])
    loss = F.cross_entropy(scores.transpose(1, 2), batch["labels"], ignore_index=IGNORED)
    return {
        "lm": ga.Loss.mean(loss, over=labels_that_count(batch)),
        "z": ga.Loss.mean(0.1 * scores.logsumexp(-1).square().mean(), over=len(scores)),
    }


def several_heads(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    out = model(batch["x"])
    return {"class": F.cross_entropy(out, batch["y"]), "value": F.smooth_l1_loss(out, batch["t"])}


def uncertain(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch["x"])
    squares = (out - batch["t"]).square()[batch["mask"]].mean()
    return 0.4 * F.cross_entropy(out, batch["y"]) + 1.7 * squares


def ctc() -> Any:
    criterion = ga.criterion(nn.CTCLoss())

    def loss_fn(model: nn.Module, batch: Batch) -> ga.Loss:
        scores = model(batch["x"]).log_softmax(-1).transpose(0, 1)
        lengths = 1 + batch["n"] % 3
        targets = 1 + (batch["y"][:, None] + torch.arange(3)) % (CLASSES - 1)
        return criterion(scores, targets, torch.full((len(lengths),), LENGTH), lengths)

    return loss_fn


def whenever() -> Any:
    generator = random.Random(1)

    class Own:
        """Draws that nobody can put back."""

        __slots__ = ()

        def __call__(self) -> float:
            return next(numbers)

    numbers = (generator.random() for _ in range(10**9))
    draw = Own()
    return lambda m, b: classes(m, b) * (1 + draw())


def switched_on() -> Any:
    """An adversarial term after a warm-up, as VQGAN's; the first batches are a plain mean."""
    updates = [0]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = classes(model, batch)
        return loss + pearson(model, batch) if updates[0] else loss

    loss_fn.updates = updates  # type: ignore[attr-defined]
    return loss_fn


def row(
    kind: str,
    model: Callable[[], nn.Module],
    loss: Callable[[], Any],
    batch: Callable[[], Any] = vectors,
    **options: Any,
) -> Row:
    return Row(kind=kind, model=model, loss=loss, batch=batch, **options)


def compared(forward: Any, batch_loss: Any, **options: Any) -> dict[str, Any]:
    return {"loss": plain(lambda m, b: batch_loss(forward(m, b), b)),
            "options": lambda: {"forward": forward, "batch_loss": batch_loss, **options}}  # fmt: skip


WEIGHTS_OF_TWO = {"weights": lambda batch: {"lm": labels_that_count(batch), "z": len(batch["ids"])}}
PAIRS = {"split": ga.split_by_samples(groups=lambda batch: torch.arange(len(batch["x"])) // 2)}

TABLE: dict[str, Row] = {
    # ------------------------------------------------------------------------------------------- exact, and not blamed
    "MLP, cross-entropy": row("sample mean", mlp, plain(classes), is_compiled=True),
    "GPT, every token counts": row("sample mean", Gpt, plain(lambda m, b: m(b["ids"], b["next"])), tokens),
    "ResNet, GroupNorm": row("sample mean", lambda: ResNet(lambda: nn.GroupNorm(2, 4)), plain(classes), images),
    "ResNet, InstanceNorm": row("sample mean", lambda: ResNet(lambda: nn.InstanceNorm2d(4)), plain(classes), images),
    "ResNet, frozen statistics": row("sample mean", frozen_statistics, plain(classes), images),
    "U-Net, BCE with pos_weight": row("sample mean", UNet, of(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), "ink"), images),
    "LSTM": row("sample mean", Recurrent, plain(classes), sequences),
    "experts, routed by token": row("sample mean", Experts, plain(classes)),
    "LayerNorm": row("sample mean", lambda: mlp(nn.LayerNorm(7)), plain(classes)),
    "weight norm": row("sample mean", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)), plain(classes)),
    "checkpointed body": row("sample mean", Checkpointed, plain(classes)),
    "GAN, generator": row("sample mean", mlp, generator_loss),
    "GAN, discriminator": row("sample mean", mlp, judge_loss),
    "R1 penalty": row("sample mean", mlp, plain(penalty_of_gradients)),
    "focal": row("sample mean", mlp, plain(focal), is_compiled=True),
    "label smoothing": row("sample mean", mlp, plain(lambda m, b: classes(m, b, label_smoothing=0.1))),
    "distillation, KL": row("sample mean", mlp, teacher),
    "PPO": row("sample mean", mlp, plain(ppo)),
    "Huber": row("sample mean", mlp, of(nn.SmoothL1Loss())),
    "quantiles": row("sample mean", mlp, plain(lambda m, b: torch.maximum(0.1 * (b["t"] - m(b["x"])), 0.9 * (m(b["x"]) - b["t"])).mean())),
    "Gaussian likelihood": row("sample mean", gaussian_net, plain(lambda m, b: F.gaussian_nll_loss(m(b["x"])[:, :CLASSES], b["t"], m(b["x"])[:, CLASSES:].exp()))),
    "triplets within samples": row("sample mean", mlp, plain(lambda m, b: F.triplet_margin_loss(m(b["x"]), m(b["second"]), b["t"]))),
    "weight decay in the loss": row("sample mean", mlp, plain(lambda m, b: classes(m, b) + 0.01 * sum(p.square().sum() for p in m.parameters()))),
    "each picture by its own count": row("sample mean", lambda: nn.Linear(FEATURES, CLASSES), plain(of_pictures), sequences),
    "a dict of plain means": row("sample mean", mlp, plain(several_heads)),
    "a factor": row("factor", mlp, plain(lambda m, b: 0.3 * classes(m, b))),
    "GPT, criterion": row("declared", Gpt, token_criterion, tokens),
    "GPT, counted": row("declared", Gpt, plain(lambda m, b: ga.Loss.mean(lm(m, b), over=labels_that_count(b))), tokens),
    "class weights, criterion": row("declared", mlp, told(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS))),
    "CTC": row("declared", lambda: nn.Linear(FEATURES, CLASSES), ctc, sequences),
    "packed": row("declared", lambda: nn.Linear(FEATURES, CLASSES), plain(packed), sequences),
    "a sum": row("declared", mlp, plain(lambda m, b: ga.Loss.sum(classes(m, b, reduction="sum")))),
    "two means, weights=": row("declared", Gpt, plain(two_losses), tokens, options=lambda: dict(WEIGHTS_OF_TWO)),
    "DPO pairs, groups=": row("coupled, told", mlp, plain(preference), options=lambda: dict(PAIRS)),
    "in-batch negatives": row("coupled, told", mlp, **compared(two_views, info_nce)),
    "Dice, combine=\"sum\"": row("coupled, told", UNet, batch=images, **compared(overlaps, dice, combine="sum")),
    "Barlow Twins": row("coupled, told", mlp, **compared(two_views, barlow)),
    "BatchNorm, exact": row("coupled, told", lambda: mlp(nn.BatchNorm1d(7)), plain(classes), options=lambda: {"batch_norm": "exact"}),
    "fused kernel": row("opaque mean", mlp, plain(lambda m, b: Fused.apply(classes(m, b)))),
    "dropout": row("random", lambda: mlp(nn.Dropout(0.4)), plain(classes), is_random=True),
    "attention dropout": row("random", lambda: Gpt(0.3), plain(lambda m, b: m(b["ids"], b["next"])), tokens, is_random=True),
    "VAE": row("random", Vae, plain(vae), is_random=True),
    "diffusion": row("random", lambda: nn.Linear(CLASSES + 1, CLASSES), plain(diffusion), is_random=True),
    "stochastic depth": row("random", lambda: mlp(StochasticDepth()), plain(classes), is_random=True),
    # ------------------------------------------------------------------------------------------------ losses, an error
    "GPT's own loss": row("mean", Gpt, plain(lm), tokens),
    "GPT's own loss, dropout": row("mean", lambda: Gpt(0.3), plain(lm), tokens, is_random=True),
    "GPT's own loss, halved": row("mean", Gpt, plain(lambda m, b: lm(m, b) / 2), tokens),
    "class weights": row("mean", mlp, plain(lambda m, b: classes(m, b, weight=CLASS_WEIGHTS))),
    "a mask": row("mean", mlp, plain(masked_by_hand), is_compiled=True),
    "a boolean index": row("mean", mlp, plain(masked)),
    "nan_to_num": row("opaque", Gpt, plain(lambda m, b: lm(m, b).nan_to_num()), tokens, loop="error"),
    "where": row("opaque", Gpt, plain(lambda m, b: torch.where(lm(m, b).isfinite(), lm(m, b), 0.0)), tokens, loop="error"),
    "a fused kernel of tokens": row("opaque", Gpt, plain(lambda m, b: Fused.apply(lm(m, b))), tokens),
    "a checkpointed head": row("opaque", Gpt, plain(checkpointed_head), tokens),
    "reduction=\"sum\"": row("sum", mlp, plain(lambda m, b: classes(m, b, reduction="sum")), is_compiled=True),
    "a sum over num_items_in_batch": row("sum", mlp, plain(lambda m, b: classes(m, b, reduction="sum") / ROWS)),
    "VAE's sum": row("sum", Vae, plain(lambda m, b: vae(m, b) * len(b["x"])), is_random=True, loop="silent"),
    "over=len(labels)": row("count", Gpt, plain(lambda m, b: ga.Loss.mean(lm(m, b), over=len(b["ids"]))), tokens),
    "over=labels.numel()": row("count", Gpt, plain(lambda m, b: ga.Loss.mean(lm(m, b), over=b["labels"].numel())), tokens),
    "z-loss": row("terms", Gpt, plain(z_loss), tokens),
    "uncertainty weights": row("terms", mlp, plain(uncertain)),
    "RMSE": row("ratio", mlp, plain(lambda m, b: F.mse_loss(m(b["x"]), b["t"]).sqrt())),
    "Dice": row("ratio", UNet, plain(lambda m, b: dice(overlaps(m, b), b)), images),
    "perplexity": row("ratio", mlp, plain(lambda m, b: classes(m, b).exp())),
    "Pearson": row("ratio", mlp, plain(pearson)),
    "InfoNCE": row("samples coupled", mlp, plain(lambda m, b: info_nce(two_views(m, b), b)), is_compiled=True),
    "pairs": row("samples coupled", mlp, plain(preference), loop="error"),
    "variance": row("ratio", mlp, plain(lambda m, b: (1 - m(b["x"]).std(0)).relu().mean())),
    "Barlow Twins, plain": row("ratio", mlp, plain(lambda m, b: barlow(two_views(m, b), b))),
    "hardest half": row("samples coupled", mlp, plain(hardest), loop="error"),
    "normalised advantages": row("samples coupled", mlp, plain(normalised_advantages)),
    "balance of experts": row("ratio", Experts, plain(balance)),
    "MMD": row("ratio", mlp, plain(discrepancy)),
    "mixup with the flipped batch": row("samples coupled", mlp, plain(mixed_up)),
    # ------------------------------------------------------------------------------------- layers and states, a warning
    "standardised by hand": row("layer", lambda: mlp(Standardized()), plain(classes)),
    "minibatch deviation": row("layer", lambda: mlp(Deviation()), plain(classes)),
    "attention over the batch": row("layer", lambda: mlp(OverBatch()), plain(classes)),
    "softmax over the batch": row("layer", lambda: mlp(Mixer()), plain(classes)),
    "an expert's capacity": row("layer", lambda: mlp(Capacity()), plain(classes)),
    "BatchNorm": row("batch norm", lambda: ResNet(lambda: nn.BatchNorm2d(4)), plain(classes), images),
    "BatchNorm without running statistics": row("batch norm", lambda: mlp(nn.BatchNorm1d(7, track_running_stats=False)), plain(classes)),
    "F.batch_norm": row("batch norm", lambda: mlp(Functional()), plain(classes)),
    "BatchNorm of a discriminator": row("batch norm", mlp, normed_judge_loss),
    "spectral norm": row("state", spectral, plain(classes)),
    "codebook": row("state", lambda: mlp(Codebook()), plain(classes)),
    "centre": row("state", lambda: mlp(Centre()), plain(classes)),
    "queue": row("state", lambda: mlp(Queue()), plain(classes)),
    "an attribute": row("own state", lambda: mlp(Attribute()), plain(classes)),
    "injected balance": row("backward", lambda: mlp(Injects()), plain(classes)),
    "a hook that clamps": row("hook", clamped, plain(classes)),
    # -------------------------------------------------------------------------------------------------- what is not seen
    "own generator": row("another loss", mlp, whenever),
    "a term after the warm-up": row("later", mlp, switched_on),
}  # fmt: skip
