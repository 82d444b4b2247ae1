"""More rows of the table of `exact_or_told_cases`: losses in the forms that people write them in, by field."""

# ruff: noqa: E501  # a row of the table is a line

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from exact_or_told_cases import (
    CLASSES,
    FEATURES,
    IGNORED,
    LENGTH,
    PAIRS,
    ROWS,
    SIZE,
    Batch,
    Experts,
    Fused,
    Gpt,
    Recurrent,
    Row,
    UNet,
    classes,
    dice,
    images,
    labels_that_count,
    masked,
    mlp,
    overlaps,
    per_sample,
    plain,
    row,
    sequences,
    tokens,
    two_views,
)


# ------------------------------------------------------------------------------------------------------------ language
def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def counted_tokens() -> Batch:
    """With `num_items_in_batch`, of the whole batch, as Transformers' Trainer hands it to every micro-batch."""
    batch = tokens()
    return {**batch, "items": torch.full((ROWS,), int((shifted(batch["labels"]) != IGNORED).sum()))}


def causal(model: Any, batch: Batch, reduction: str = "mean") -> Tensor:
    labels = shifted(batch["labels"]).flatten()
    return F.cross_entropy(model.scores(batch["ids"]).flatten(0, 1), labels, ignore_index=IGNORED, reduction=reduction)


def by_items(model: Any, batch: Batch) -> Tensor:
    return causal(model, batch, "sum") / batch["items"][0]


def chosen(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of tokens, the log-probability of each label, and which of them count."""
    scores = model.scores(batch["ids"])
    labels = batch["labels"].clamp(min=0)
    return scores, scores.log_softmax(-1).gather(-1, labels[..., None])[..., 0], batch["labels"] != IGNORED


def smoothed(model: Any, batch: Batch) -> Tensor:
    scores, log_probs, counts = chosen(model, batch)
    return -((0.9 * log_probs + 0.1 * scores.log_softmax(-1).mean(-1)) * counts).sum() / counts.sum()


def label_smoother(model: Any, batch: Batch) -> Tensor:
    """As Transformers' `LabelSmoother` has it."""
    scores, log_probs, counts = chosen(model, batch)
    number = counts.numel() - (~counts).long().sum()
    everything = -scores.log_softmax(-1).sum(-1, keepdim=True).masked_fill(~counts[..., None], 0.0)
    return 0.9 * -log_probs.masked_fill(~counts, 0.0).sum() / number + 0.1 * everything.sum() / (number * 2 * CLASSES)


def clipped_ratio(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    _, log_probs, counts = chosen(model, batch)
    before = log_probs.detach() + 0.1 * batch["ids"].to(log_probs.dtype).sin()
    advantages = batch["ids"].to(log_probs.dtype).mean(1, keepdim=True) - CLASSES
    ratio = (log_probs - before).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), counts


def by_tokens(model: Any, batch: Batch) -> Tensor:
    loss, counts = clipped_ratio(model, batch)
    return (loss * counts).sum() / counts.sum().clamp(min=1.0)


def by_sequences(model: Any, batch: Batch) -> Tensor:
    loss, counts = clipped_ratio(model, batch)
    return ((loss * counts).sum(-1) / counts.sum(-1).clamp(min=1)).mean()


def by_length(model: Any, batch: Batch) -> Tensor:
    loss, counts = clipped_ratio(model, batch)
    return (loss * counts).sum() / (len(loss) * LENGTH)


def with_entropy(model: Any, batch: Batch) -> Tensor:
    scores, _, counts = chosen(model, batch)
    entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    return by_tokens(model, batch) - 0.01 * (entropy * counts).sum() / counts.sum()


def counted_z_loss(model: Any, batch: Batch) -> Tensor:
    scores, log_probs, counts = chosen(model, batch)
    return -log_probs[counts].mean() + 0.1 * scores.logsumexp(-1)[counts].square().mean()


def group_advantages(model: nn.Module, batch: Batch) -> Tensor:
    rewards = batch["t"][:, 0].view(-1, 2)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return (per_sample(model, batch) * advantages.flatten()).mean()


def normalised_returns(model: nn.Module, batch: Batch) -> Tensor:
    returns = batch["t"][:, 0]
    return F.mse_loss(model(batch["x"])[:, 0], (returns - returns.mean()) / (returns.std() + 1e-8))


def clipped_values(model: nn.Module, batch: Batch) -> Tensor:
    values, before, returns = model(batch["x"])[:, 0], batch["t"][:, 1], batch["t"][:, 0]
    clipped = before + (values - before).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean()


# -------------------------------------------------------------------------------------------------------------- vision
def by_positives(model: nn.Module, batch: Batch) -> Tensor:
    """RetinaNet's focal loss, as its paper divides it."""
    out, targets = model(batch["x"]), batch["mask"].double()
    right = (1 - (out.sigmoid() - targets).abs()) ** 2
    loss = (1 - right) * F.binary_cross_entropy_with_logits(out, targets, reduction="none")
    return loss.sum() / targets.sum().clamp(min=1)


def dice_of_images(model: nn.Module, batch: Batch) -> Tensor:
    ink, target = model(batch["x"]).sigmoid().flatten(1), batch["ink"].flatten(1)
    return (1 - (2 * (ink * target).sum(1) + 1) / (ink.sum(1) + target.sum(1) + 1)).mean()


def lovasz(model: nn.Module, batch: Batch) -> Tensor:
    """The hinge over all pixels of the batch (Berman et al. 2018)."""
    scores, ink = model(batch["x"]).flatten(), batch["ink"].flatten()
    errors, order = (1 - scores * (2 * ink - 1)).sort(descending=True)
    ink = ink[order]
    jaccard = 1 - (ink.sum() - ink.cumsum(0)) / (ink.sum() + (1 - ink).cumsum(0))
    return (errors.relu() * jaccard.diff(prepend=jaccard.new_zeros(1))).sum()


def lovasz_of_images(model: nn.Module, batch: Batch) -> Tensor:
    one = [lovasz(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(len(batch["x"]))]
    return torch.stack(one).mean()


def tversky(model: nn.Module, batch: Batch) -> Tensor:
    ink, target = model(batch["x"]).sigmoid(), batch["ink"]
    both = (ink * target).sum()
    return (1 - both / (both + 0.3 * (ink * (1 - target)).sum() + 0.7 * ((1 - ink) * target).sum())) ** 0.75


def similarities(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    one, other = (F.normalize(view, dim=1) for view in two_views(model, batch))
    return one @ other.T, torch.eye(len(one), dtype=torch.bool)


def nt_xent(model: nn.Module, batch: Batch) -> Tensor:
    views = F.normalize(torch.cat(two_views(model, batch)), dim=1)
    places = torch.arange(len(views))
    scores = (views @ views.T / 0.5).masked_fill(torch.eye(len(views), dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, places.roll(len(views) // 2))


def sup_con(model: nn.Module, batch: Batch) -> Tensor:
    views = F.normalize(model(batch["x"]), dim=1)
    itself = torch.eye(len(views), dtype=torch.bool)
    alike = (batch["y"][:, None] == batch["y"]) & ~itself
    scores = views @ views.T / 0.5
    log_probs = scores - scores.masked_fill(itself, -1e9).logsumexp(1, keepdim=True)
    return -((log_probs * alike).sum(1) / alike.sum(1).clamp(min=1)).mean()


def sig_lip(model: nn.Module, batch: Batch) -> Tensor:
    scores, itself = similarities(model, batch)
    return -F.logsigmoid((2.0 * itself - 1) * scores * 5).sum() / len(scores)


def hardest_triplets(model: nn.Module, batch: Batch) -> Tensor:
    views = model(batch["x"])
    apart, alike = torch.cdist(views, views), batch["y"][:, None] == batch["y"]
    return ((apart * alike).max(1).values - apart.masked_fill(alike, 1e9).min(1).values + 0.3).relu().mean()


class ArcFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.centres = mlp(), nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(self.body(x)), F.normalize(self.centres)).clamp(-0.99, 0.99)
        return 8 * torch.where(F.one_hot(y, CLASSES).bool(), (cosines.acos() + 0.3).cos(), cosines)


def masked_patches(model: nn.Module, batch: Batch) -> Tensor:
    """MAE: a mean within patches, and one over those that are hidden, unequally many in each sample."""
    loss, hidden = (model(batch["x"]) - batch["t"]).square(), batch["mask"]
    return (loss.view(-1, 1, CLASSES).mean(-1) * hidden[:, :1]).sum() / hidden[:, :1].sum()


def snr_weights(batch: Batch) -> Tensor:
    noise = (batch["y"].double() + 1) / 5
    return noise.clamp(max=0.5) / noise


def min_snr(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["t"]).square().mean(1) * snr_weights(batch)).mean()


def min_snr_normalised(model: nn.Module, batch: Batch) -> Tensor:
    weights = snr_weights(batch)
    return ((model(batch["x"]) - batch["t"]).square().mean(1) * weights).sum() / weights.sum()


def wasserstein(model: nn.Module, batch: Batch) -> Tensor:
    real, made = batch["x"], batch["second"]
    between = (0.3 * real + 0.7 * made).requires_grad_()
    (slope,) = torch.autograd.grad(model(between)[:, 0].sum(), between, create_graph=True)
    return model(made)[:, 0].mean() - model(real)[:, 0].mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def penalty_of_the_mean(model: nn.Module, batch: Batch) -> Tensor:
    """R1 of the mean's gradient: each sample's slope is divided by the micro-batch's samples, and then squared."""
    x = batch["x"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].mean(), x, create_graph=True)
    return F.softplus(model(x)[:, 0]).mean() + 5 * slope.square().sum(1).mean()


def relativistic(model: nn.Module, batch: Batch) -> Tensor:
    real, made = model(batch["x"])[:, 0], model(batch["second"])[:, 0]
    return F.softplus(made.mean() - real).mean() + F.softplus(made - real.mean()).mean()


class Quantised(nn.Module):
    """VQ-VAE with a codebook that is learned by its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.book = nn.Linear(FEATURES, 6), nn.Linear(6, FEATURES), nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encode(x)
        code = self.book(torch.cdist(hidden, self.book.weight).argmin(1))
        return self.decode(hidden + (code - hidden).detach()), hidden, code


def commitment(model: Any, batch: Batch) -> Tensor:
    made, hidden, code = model(batch["x"])
    return F.mse_loss(made, batch["x"]) + F.mse_loss(code, hidden.detach()) + 0.25 * F.mse_loss(hidden, code.detach())


def codes_used(model: Any, batch: Batch) -> Tensor:
    shares = (-torch.cdist(model.encode(batch["x"]), model.book.weight)).softmax(1).mean(0)
    return commitment(model, batch) + 0.1 * (shares * shares.log()).sum()


def byol() -> Any:
    target = mlp().requires_grad_(False)
    return lambda m, b: (2 - 2 * F.cosine_similarity(m(b["x"]), target(b["second"]))).mean()


class CentredLoss(nn.Module):
    """DINO's: the centre is a buffer of the loss."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        shares = ((teacher - self.centre) / 0.1).softmax(1)
        self.centre = 0.9 * self.centre + 0.1 * teacher.mean(0)
        return -(shares * (student / 0.1).log_softmax(1)).sum(1).mean()


def dino() -> Any:
    teacher, loss = mlp().requires_grad_(False), CentredLoss()
    return lambda m, b: loss(m(b["x"]), teacher(b["second"]))


def kept_centre() -> Any:
    teacher, kept = mlp().requires_grad_(False), [torch.zeros(CLASSES)]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        out = teacher(batch["second"])
        shares = ((out - kept[0]) / 0.1).softmax(1)
        kept[0] = 0.9 * kept[0] + 0.1 * out.mean(0)
        return -(shares * model(batch["x"]).log_softmax(1)).sum(1).mean()

    return loss_fn


def sinkhorn(model: nn.Module, batch: Batch) -> Tensor:
    shares = (model(batch["second"]).detach() / 0.5).exp()
    for _ in range(3):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return -(shares * model(batch["x"]).log_softmax(1)).sum(1).mean()


def vic_reg(model: nn.Module, batch: Batch) -> Tensor:
    one, other = two_views(model, batch)
    return F.mse_loss(one, other) + (1 - (one.var(0) + 1e-4).sqrt()).relu().mean()


class Whitened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        factor = torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(x.shape[1]))
        return torch.linalg.solve_triangular(factor, x.T, upper=False).T


class Renorm(nn.Module):
    """Batch renormalisation (Ioffe 2017)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("deviation", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(0), x.std(0)
        scale = (deviation / self.deviation).clamp(1 / 3, 3).detach()
        shift = ((mean - self.mean) / self.deviation).clamp(-5, 5).detach()
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.deviation.lerp_(deviation, 0.1)
        return (x - mean) / deviation * scale + shift


# -------------------------------------------------------------------------------------------------- audio, and in general
def scale_invariant(model: nn.Module, batch: Batch) -> Tensor:
    made, target = model(batch["x"]), batch["t"]
    part = (made * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True) * target
    return -10 * torch.log10(part.square().sum(1) / (made - part).square().sum(1)).mean()


def concordance(model: nn.Module, batch: Batch) -> Tensor:
    one, other = model(batch["x"])[:, 0], batch["t"][:, 0]
    both = ((one - one.mean()) * (other - other.mean())).mean()
    return 1 - 2 * both / (one.var() + other.var() + (one.mean() - other.mean()).square())


def ctc(model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
    scores = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    lengths, targets = 1 + batch["n"] % 3, 1 + (batch["y"][:, None] + torch.arange(3)) % (CLASSES - 1)
    return F.ctc_loss(scores, targets, torch.full((len(lengths),), LENGTH), lengths, reduction=reduction)


def transducer(model: nn.Module, batch: Batch) -> Tensor:
    """A recursion over the frames of each sample, as RNN-T's."""
    losses = []
    for scores, frames in zip(model(batch["x"]).log_softmax(-1), batch["n"].tolist(), strict=True):
        total = scores[0, 0]
        for t in range(1, frames):
            total = torch.logaddexp(total + scores[t, 0], total + scores[t, 1])
        losses.append(-total)
    return torch.stack(losses).mean()


def switch_balance(model: Any, batch: Batch) -> Tensor:
    shares = model.router(batch["x"]).softmax(-1)
    taken = F.one_hot(shares.argmax(-1), 3).double().mean((0, 1))
    return F.cross_entropy(model(batch["x"]).mean(1), batch["y"]) + 0.03 * (taken * shares.mean((0, 1))).sum()


def importance(model: Any, batch: Batch) -> Tensor:
    share = model.router(batch["x"]).softmax(-1).sum(0)
    return classes(model, batch) + 0.1 * share.var() / share.mean() ** 2


def router_z_loss(model: Any, batch: Batch) -> Tensor:
    squares = model.router(batch["x"]).logsumexp(-1).square()
    return F.cross_entropy(model(batch["x"]).mean(1), batch["y"]) + 0.01 * squares.mean()


def below_quantile(model: nn.Module, batch: Batch) -> Tensor:
    loss = per_sample(model, batch)
    return loss.clamp(max=loss.detach().quantile(0.8)).mean()


def nan_mean(model: nn.Module, batch: Batch) -> Tensor:
    return torch.where(batch["mask"], (model(batch["x"]) - batch["t"]).square(), math.nan).nanmean()


def where_by_mask(model: nn.Module, batch: Batch) -> Tensor:
    return torch.where(batch["mask"], (model(batch["x"]) - batch["t"]).square(), 0.0).sum() / batch["mask"].sum()


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    return (per_sample(model, batch) * (1 + batch["y"])).sum() / (1 + batch["y"]).sum()


def balanced(model: nn.Module, batch: Batch) -> Tensor:
    loss = per_sample(model, batch)
    return torch.stack([loss[batch["y"] == c].mean() for c in range(CLASSES) if (batch["y"] == c).any()]).mean()


def few_active(model: nn.Module, batch: Batch) -> Tensor:
    active = model(batch["x"]).sigmoid().mean(0)
    return classes(model, batch) + 0.1 * (0.05 * (0.05 / active).log() + 0.95 * (0.95 / (1 - active)).log()).sum()


def of_one_size(model: nn.Module, batch: Batch) -> Tensor:
    loss, other = classes(model, batch), F.mse_loss(model(batch["x"]), batch["t"])
    return loss + other * (loss.detach() / other.detach())


def at_the_border(model: nn.Module, batch: Batch) -> Tensor:
    """A residual, and a condition at points that no batch has."""
    return model(batch["x"]).square().mean() + (model(torch.zeros(3, FEATURES)) - 1).square().sum()


def learned_weights(model: Any, batch: Batch) -> Tensor:
    out, (one, other) = model["net"](batch["x"]), model["scales"]
    return (-one).exp() * F.cross_entropy(out, batch["y"]) + (-other).exp() * F.mse_loss(out, batch["t"]) + one + other


def with_scales() -> nn.Module:
    return nn.ModuleDict({"net": mlp(), "scales": nn.ParameterList([torch.zeros(()), torch.zeros(())])})


def kl_of_weights(weight: Tensor) -> Tensor:
    """Of Bayesian layers: to a prior, whatever the batch."""
    deviation = F.softplus(weight)
    return (0.5 * (weight.square() + deviation.square()) - deviation.log()).sum() + weight.exp().log1p().mean()


def normed_weights() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, SIZE))
    return nn.Sequential(first, nn.Linear(SIZE, CLASSES))


def by_samples(model: nn.Module, batch: Batch) -> Tensor:
    return torch.func.vmap(lambda x, y: F.cross_entropy(model(x[None])[0], y))(batch["x"], batch["y"]).mean()


def over(loss: Callable[[Any, Batch], Tensor], count: Callable[[Batch], Any]) -> Callable[[], Any]:
    return plain(lambda m, b: ga.Loss.mean(loss(m, b), over=count(b)))


def frames() -> nn.Module:
    return nn.Linear(FEATURES, CLASSES)


WRITTEN: dict[str, Row] = {
    # ------------------------------------------------------------------------------------------- exact, and not blamed
    "GRPO, a mean of each sequence": row("sample mean", Gpt, plain(by_sequences), tokens),
    "GRPO, a constant length": row("sample mean", Gpt, plain(by_length), tokens),
    "clipped values": row("sample mean", mlp, plain(clipped_values)),
    "Dice of each image": row("sample mean", UNet, plain(dice_of_images), images),
    "Lovasz of each image": row("sample mean", UNet, plain(lovasz_of_images), images),
    "ArcFace": row("sample mean", ArcFace, plain(lambda m, b: F.cross_entropy(m(b["x"], b["y"]), b["y"]))),
    "distillation with a temperature": row("sample mean", mlp, plain(lambda m, b: 16 * F.kl_div((m(b["x"]) / 4).log_softmax(1), (b["t"] / 4).softmax(1), reduction="batchmean"))),
    "diffusion, min-SNR": row("sample mean", mlp, plain(min_snr)),
    "GAN, hinge": row("sample mean", mlp, plain(lambda m, b: F.relu(1 - m(b["x"])[:, 0]).mean() + F.relu(1 + m(b["second"])[:, 0]).mean())),
    "WGAN-GP": row("sample mean", mlp, plain(wasserstein)),
    "VQ-VAE, commitment": row("sample mean", Quantised, plain(commitment)),
    "BYOL": row("sample mean", mlp, byol),
    "scale-invariant SNR": row("sample mean", mlp, plain(scale_invariant)),
    "CTC, a mean over targets": row("sample mean", frames, plain(ctc), sequences),
    "transducer": row("sample mean", frames, plain(transducer), sequences),
    "z-loss of a router": row("sample mean", Experts, plain(router_z_loss), sequences),
    "every step of a sequence": row("sample mean", Recurrent, plain(lambda m, b: sum(F.cross_entropy(m.head(m.body(b["x"])[0][:, t]), b["y"]) for t in range(LENGTH)) / LENGTH), sequences),
    "learned weights of two tasks": row("sample mean", with_scales, plain(learned_weights)),
    "a condition at the border": row("sample mean", mlp, plain(at_the_border)),
    "L1 of normed weights": row("sample mean", normed_weights, plain(lambda m, b: classes(m, b) + 0.01 * m[0].weight.abs().sum())),
    "KL of weights": row("sample mean", mlp, plain(lambda m, b: classes(m, b) + 0.01 * kl_of_weights(m[0].weight))),
    "log-determinant of weights": row("sample mean", mlp, plain(lambda m, b: classes(m, b) - 0.01 * torch.linalg.slogdet(m[0].weight.T @ m[0].weight)[1])),
    "a mean over samples, then one over features": row("sample mean", mlp, plain(lambda m, b: (m(b["x"]) - b["t"]).square().mean(0).sum())),
    "vmap": row("sample mean", mlp, plain(by_samples)),
    "a checkpointed loss": row("sample mean", mlp, plain(lambda m, b: checkpoint(lambda x, y: F.cross_entropy(m(x), y), b["x"], b["y"], use_reentrant=False))),
    "a fused kernel of each sample": row("sample mean", mlp, plain(lambda m, b: Fused.apply(per_sample(m, b)).mean())),
    "GPT, labels shifted, counted": row("declared", Gpt, over(causal, lambda b: (shifted(b["labels"]) != IGNORED).sum()), tokens),
    "the sum over num_items_in_batch, a sum": row("declared", Gpt, plain(lambda m, b: ga.Loss.sum(by_items(m, b))), counted_tokens),
    "two means over the same tokens": row("declared", Gpt, over(counted_z_loss, labels_that_count), tokens),
    "GRPO, groups=": row("coupled, told", mlp, plain(group_advantages), options=lambda: dict(PAIRS)),
    # ---------------------------------------------------------------------------------------------------------- errors
    "labels shifted": row("mean", Gpt, plain(causal), tokens),
    "label smoothing by hand": row("mean", Gpt, plain(smoothed), tokens),
    "label smoothing of two sums": row("mean", Gpt, plain(label_smoother), tokens),
    "PPO of tokens": row("mean", Gpt, plain(by_tokens), tokens),
    "PPO of tokens, with entropy": row("mean", Gpt, plain(with_entropy), tokens),
    "focal, by positives": row("mean", mlp, plain(by_positives)),
    "MAE, by hidden patches": row("mean", mlp, plain(masked_patches)),
    "diffusion, weights normalised": row("mean", mlp, plain(min_snr_normalised)),
    "sample weights": row("mean", mlp, plain(weighted)),
    "nanmean": row("mean", mlp, plain(nan_mean)),
    "where, by a mask": row("mean", mlp, plain(where_by_mask)),
    "CTC, by targets": row("mean", frames, plain(lambda m, b: ctc(m, b, reduction="sum") / (1 + b["n"] % 3).sum()), sequences),
    "a mask, in a checkpoint": row("mean", mlp, plain(lambda m, b: checkpoint(lambda x: (m(x) - b["t"]).square()[b["mask"]].mean(), b["x"], use_reentrant=False))),
    "a mask, halved for two processes": row("mean", mlp, plain(lambda m, b: masked(m, b) / 2)),
    "classes balanced in the batch": row("mean", mlp, plain(balanced)),
    "labels shifted, over num_items_in_batch": row("sum", Gpt, plain(by_items), counted_tokens),
    "a sum over a fixed batch size": row("sum", mlp, plain(lambda m, b: classes(m, b, reduction="sum") / SIZE)),
    "distillation, a sum": row("sum", mlp, plain(lambda m, b: F.kl_div(m(b["x"]).log_softmax(1), b["t"].softmax(1), reduction="sum"))),
    "labels shifted, counted as they are": row("count", Gpt, over(causal, labels_that_count), tokens),
    "Lovasz": row("ratio", UNet, plain(lovasz), images),
    "Tversky": row("ratio", UNet, plain(tversky), images),
    "cross-entropy and Dice": row("ratio", UNet, plain(lambda m, b: F.binary_cross_entropy_with_logits(m(b["x"]), b["ink"]) + dice(overlaps(m, b), b)), images),
    "concordance": row("ratio", mlp, plain(concordance)),
    "PSNR": row("ratio", mlp, plain(lambda m, b: 10 * torch.log10(F.mse_loss(m(b["x"]), b["t"])))),
    "the worst sample": row("ratio", mlp, plain(lambda m, b: per_sample(m, b).max())),
    "the tail of the losses": row("ratio", mlp, plain(lambda m, b: per_sample(m, b).logsumexp(0) - math.log(len(b["x"])))),
    "variation of experts' shares": row("ratio", Experts, plain(importance)),
    "balance of a switch": row("ratio", Experts, plain(switch_balance), sequences),
    "codes used": row("ratio", Quantised, plain(codes_used)),
    "few active": row("ratio", mlp, plain(few_active)),
    "VICReg": row("ratio", mlp, plain(vic_reg)),
    "NT-Xent": row("samples coupled", mlp, plain(nt_xent)),
    "SupCon": row("samples coupled", mlp, plain(sup_con)),
    "SigLIP": row("samples coupled", mlp, plain(sig_lip)),
    "the hardest triplets": row("samples coupled", mlp, plain(hardest_triplets)),
    "returns normalised": row("samples coupled", mlp, plain(normalised_returns)),
    "R1 of the mean": row("samples coupled", mlp, plain(penalty_of_the_mean)),
    "relativistic GAN": row("samples coupled", mlp, plain(relativistic)),
    "Sinkhorn": row("samples coupled", mlp, plain(sinkhorn)),
    "clipped at a quantile": row("samples coupled", mlp, plain(below_quantile)),
    "losses of one size": row("samples coupled", mlp, plain(of_one_size)),
    # -------------------------------------------------------------------------------------------------------- warnings
    "whitening": row("layer", lambda: mlp(Whitened()), plain(classes)),
    "batch renormalisation": row("state", lambda: mlp(Renorm()), plain(classes)),
    "the centre of a loss": row("own state", mlp, dino),
    "a centre in a closure": row("own state", mlp, kept_centre),
}  # fmt: skip
