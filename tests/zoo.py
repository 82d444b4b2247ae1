"""Models and losses for the audit: each with what is to blame, and nothing if it is exact. All are tiny.

An entry makes everything anew: the model, the loss function, a batch, and the size of the micro-batches.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.auditing.audit_run import Task
from gradaccum.auditing.audit_task import make_task
from gradaccum.whole_batch.runners import RunnerOptions

ROWS, FEATURES, CLASSES, TIME = 13, 6, 3, 5
SIZE = 4  # of micro-batches: 4, 3, 3, 3

LossFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One entry of the zoo.

    Attributes:
        model: makes it.
        loss: ``loss_fn``; None where there is a ``batch_loss``.
        batch: makes it.
        culprits: kind and place of everything that is to blame; empty if exact.
        size: of the micro-batches.
        options: further options of the audit.
    """

    model: Callable[[], nn.Module]
    loss: LossFunction | None
    batch: Callable[[], Any]
    culprits: frozenset[tuple[str, str]] = frozenset()
    size: int = SIZE
    options: Callable[[], dict[str, Any]] = dict


def case(model: Any, loss: Any, batch: Any = None, *culprits: tuple[str, str], **options: Any) -> Case:
    return Case(model=model, loss=loss, batch=batch or vectors, culprits=frozenset(culprits), **options)


def task(model: Any, loss: LossFunction, batch: Any) -> Task:
    """What `ga.audit` makes of its arguments."""
    options = RunnerOptions(
        loss_fn=loss,
        forward=None,
        batch_loss=None,
        combine="concat",
        kept_graphs=None,
        weights=None,
        batch_norm="micro",
        lockstep=False,
        activations="device",
    )
    return make_task(model, batch, options, make_step=ga.TrainStep)


# ------------------------------------------------------------------------------------------------------------- batches
def vectors(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, FEATURES), torch.arange(rows) % CLASSES


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 3, 6, 6), torch.arange(ROWS) % CLASSES


def sequences() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (ROWS, TIME))
    lengths = 1 + torch.arange(ROWS) % TIME
    return torch.randn(ROWS, TIME, FEATURES), labels.masked_fill(torch.arange(TIME) >= lengths[:, None], -100)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, FEATURES), torch.randn(ROWS, FEATURES)


# -------------------------------------------------------------------------------------------------------------- losses
def cross_entropy(**options: Any) -> LossFunction:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], **options)


_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
classes = cross_entropy()
weighted = cross_entropy(weight=_WEIGHTS)
weighted_smoothed = cross_entropy(weight=_WEIGHTS, label_smoothing=0.1)
plain_sum = cross_entropy(reduction="sum")


def squares(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - F.one_hot(batch[1], CLASSES)).square().mean()


def tokens(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])


def tokens_told(model: Any, batch: Any) -> ga.Loss:
    return ga.criterion(nn.CrossEntropyLoss())(model(batch[0]).transpose(1, 2), batch[1])


def masked_mean(model: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return losses.sum() / (batch[1] != -100).sum()


def sum_of_means(model: Any, batch: Any) -> ga.Loss:
    return ga.Loss.sum(classes(model, batch))  # a mean, called a sum: what `loss.backward()` in a loop does


def root(model: Any, batch: Any) -> Tensor:
    return squares(model, batch).sqrt()


def dice(model: Any, batch: Any) -> Tensor:
    chances, targets = model(batch[0]).softmax(-1), F.one_hot(batch[1], CLASSES)
    return 1 - (2 * (chances * targets).sum(0) / (chances + targets).sum(0)).mean()


def outputs(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), model(batch[1])


def contrastive_of(outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    one, other = F.normalize(outputs[0], dim=1), F.normalize(outputs[1], dim=1)
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))


def contrastive(model: Any, batch: Any) -> Tensor:
    return contrastive_of(outputs(model, batch), batch)


def hardest(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").topk(len(batch[0]) // 2).values.mean()


def two_terms(model: Any, batch: Any) -> dict[str, ga.Loss]:
    made = model(batch[0])
    criterion = ga.criterion(nn.CrossEntropyLoss())
    return {
        "label": criterion(made.transpose(1, 2), batch[1]),
        "size": ga.Loss.mean(made.square().mean(), over=len(made)),
    }


def two_counts(batch: Any) -> dict[str, Any]:
    return {"label": (batch[1] != -100).sum(), "size": len(batch[0])}


def penalised(model: Any, batch: Any) -> Tensor:
    return classes(model, batch) + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


def mixup(model: Any, batch: Any) -> Tensor:
    x, y = batch
    share = torch.distributions.Beta(0.4, 0.4).sample()
    order = torch.randperm(len(x))
    made = model(share * x + (1 - share) * x[order])
    return share * F.cross_entropy(made, y) + (1 - share) * F.cross_entropy(made, y[order])


def own_noise(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x + 0.1 * torch.randn_like(x) * torch.rand(len(x), 1)), y)


def beta_noise(model: Any, batch: Any) -> Tensor:
    x, y = batch
    shares = torch.distributions.Beta(0.4, 0.4).sample((len(x), 1))
    return F.cross_entropy(model(x * shares + torch.poisson(x.detach().exp())), y)


def sampled_actions(model: Any, batch: Any) -> Tensor:
    policy = torch.distributions.Categorical(logits=model(batch[0]))
    actions = policy.sample()
    return -(policy.log_prob(actions) * (actions == batch[1])).mean()


def autocast(model: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(batch[0]).float(), batch[1])


# -------------------------------------------------------------------------------------------------------------- models
def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), *between, nn.Tanh(), nn.Linear(8, CLASSES))


def convolution(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *between, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def residual() -> nn.Module:
    layers = {"stem": nn.Conv2d(3, 4, 3), "blocks": nn.Sequential(Residual(), Residual())}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(4, CLASSES)}
    return nn.Sequential(OrderedDict({**layers, **head}))


class MinibatchDeviation(nn.Module):
    """One more feature: how much the batch varies (Karras et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.std(0).mean().expand(len(x), 1)], dim=1)


class BatchAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ x.T).softmax(-1) @ x


class SoftmaxOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(0)


class NormalisesByHand(nn.Module):
    """Batch normalisation in code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.batch_norm(self.first(x), None, None, training=True).tanh())


class Experts(nn.Module):
    """Each sample to its best expert, as long as that one has room."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        best = chances.argmax(-1)
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (best == i).nonzero().flatten()[: int(self.capacity * len(x) / 2)]
            made = made.index_add(0, chosen, expert(x[chosen]) * chances[chosen, i : i + 1])
        return x + made


class DropsDepth(nn.Module):
    """Skips itself, for all samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * (torch.rand(()) * 2)


class Counting(nn.Module):
    """Scales by how often it has been called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(FEATURES, 8, batch_first=True, **options)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.output(self.embedding(x)).mean(1))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)
        self.frozen = nn.Linear(CLASSES, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.used(x))


class Casting(nn.Module):
    """Asks for float32 wherever it can, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = torch.full((CLASSES,), 0.5)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float().softmax(-1, dtype=torch.float32) * self.scale + torch.zeros(1)


class NotCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.stream = iter(())  # which nothing can copy

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def half_vectors() -> tuple[Tensor, Tensor]:
    x, y = vectors(128)
    return x.to(torch.bfloat16), y


def encoder(dropout: float = 0.1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=dropout, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(FEATURES, CLASSES))


def frozen_statistics() -> nn.Module:
    model = mlp(nn.BatchNorm1d(8))
    model[1].eval()
    return model


_COUPLED, _WEIGHED, _RANDOM = (("coupled-loss", "the loss"), ("loss-weight", "the loss"), ("random", "the loss"))
_TOLD = {"options": lambda: {"weights": two_counts}}
_TOKENS = partial(nn.Linear, FEATURES, CLASSES)

EXACT: dict[str, Case] = {
    "mlp": case(mlp, classes),
    "squares": case(mlp, squares),
    "dropout": case(lambda: mlp(nn.Dropout(0.5)), classes),
    "other dropouts": case(lambda: convolution(nn.Dropout2d(0.3), nn.AlphaDropout(0.2), nn.RReLU()), classes, images),
    "noise of its own": case(mlp, own_noise),
    "beta and poisson": case(mlp, beta_noise),
    "sampled actions": case(mlp, sampled_actions),
    "group norm": case(lambda: convolution(nn.GroupNorm(2, 4)), classes, images),
    "instance norm": case(lambda: convolution(nn.InstanceNorm2d(4, affine=True)), classes, images),
    "layer norm": case(lambda: mlp(nn.LayerNorm(8)), classes),
    "frozen statistics": case(frozen_statistics, classes),
    "lstm with dropout": case(lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3), tokens_told, sequences),
    "gru": case(lambda: Recurrent(nn.GRU), tokens_told, sequences),
    "transformer with dropout": case(encoder, tokens_told, sequences),
    "class weights, told": case(
        mlp,
        lambda model, batch: ga.criterion(nn.CrossEntropyLoss(_WEIGHTS.to(batch[0].dtype)))(model(batch[0]), batch[1]),
    ),
    "label smoothing": case(mlp, cross_entropy(label_smoothing=0.1)),
    "sum, told": case(mlp, lambda model, batch: ga.Loss.sum(plain_sum(model, batch))),
    "two terms": case(_TOKENS, two_terms, sequences, **_TOLD),
    "penalty on weights": case(mlp, penalised),
    "contrastive, in two passes": case(
        lambda: mlp(nn.Dropout(0.2)), None, pairs,
        options=lambda: {"forward": outputs, "batch_loss": contrastive_of},
    ),
    "tied weights": case(Tied, classes, lambda: (torch.randint(0, 11, (ROWS, TIME)), torch.arange(ROWS) % CLASSES)),
    "unused and frozen": case(PartlyUsed, classes),
    "casts to float32": case(Casting, classes),
    "cannot be copied": case(NotCopied, classes),
    "experts with room": case(lambda: mlp(Experts(2.0)), classes),
    "autocast": case(mlp, autocast),
    "one sample at a time": case(mlp, classes, size=1),
}  # fmt: skip

INEXACT: dict[str, Case] = {
    "batch norm": case(lambda: mlp(nn.BatchNorm1d(8)), classes, None, ("batch-norm", "1")),
    "batch norm 2d": case(lambda: convolution(nn.BatchNorm2d(4)), classes, images, ("batch-norm", "1")),
    "batch norm without statistics": case(
        lambda: mlp(nn.BatchNorm1d(8, track_running_stats=False)), classes, None, ("batch-norm", "1")
    ),
    "batch norm in functional code": case(NormalisesByHand, classes, None, ("batch-norm", "NormalisesByHand")),
    "residual": case(
        residual, classes, images, ("batch-norm", "blocks.0.norm"), ("batch-norm", "blocks.1.norm")
    ),
    "instance norm with statistics": case(
        lambda: convolution(nn.InstanceNorm2d(4, track_running_stats=True)), classes, images, ("buffer", "1")
    ),
    "spectral norm": case(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 8)), nn.Linear(8, CLASSES)),
        classes, None, ("buffer", "0.parametrizations.weight.0")),
    "calls counted": case(lambda: mlp(Counting()), classes, None, ("buffer", "1")),
    "minibatch deviation": case(
        lambda: nn.Sequential(nn.Linear(FEATURES, 7), MinibatchDeviation(), nn.Linear(8, CLASSES)),
        classes, None, ("unknown", "1"),
    ),
    "attention over the batch": case(lambda: mlp(BatchAttention()), classes, None, ("unknown", "1")),
    "softmax over the batch": case(lambda: mlp(SoftmaxOverBatch()), classes, None, ("unknown", "1")),
    "experts that overflow": case(lambda: mlp(Experts(0.5)), classes, None, ("unknown", "1")),
    "two different layers": case(
        lambda: mlp(nn.BatchNorm1d(8), BatchAttention(), nn.Dropout(0.2)), classes, None,
        ("batch-norm", "1"), ("unknown", "2"),
    ),
    "contrastive": case(mlp, contrastive, pairs, _COUPLED),
    "dice": case(mlp, dice, None, _COUPLED),
    "root of a mean": case(mlp, root, None, _COUPLED),
    "hardest half": case(mlp, hardest, None, _COUPLED),
    "mean over tokens": case(_TOKENS, tokens, sequences, _WEIGHED),
    "mean over a mask": case(_TOKENS, masked_mean, sequences, _WEIGHED),
    "class weights": case(mlp, weighted, None, _WEIGHED),
    "class weights, smoothed": case(mlp, weighted_smoothed, None, _WEIGHED),
    "sum": case(mlp, plain_sum, None, _WEIGHED),
    "means added up": case(mlp, sum_of_means, None, _WEIGHED),
    # By the number of micro-batches: a mean of means.
    "divided by hand": case(mlp, lambda model, batch: ga.Loss.sum(classes(model, batch) / 4), None, _WEIGHED),
    "wrong count": case(
        _TOKENS, lambda model, batch: ga.Loss.mean(tokens(model, batch), over=len(batch[0])), sequences, _WEIGHED),
    "batch norm and tokens": case(
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES),
                              nn.Unflatten(0, (-1, TIME))),
        tokens, sequences, ("batch-norm", "1"), _WEIGHED,
    ),
    "mixup": case(mlp, mixup, None, _RANDOM),
    "one scale for all": case(
        mlp, lambda model, batch: F.cross_entropy(model(batch[0] * torch.rand(())), batch[1]), None, _RANDOM),
    "Python's random": case(
        mlp, lambda model, batch: F.cross_entropy(model(batch[0]) * (0.5 + random.random()), batch[1]), None, _RANDOM),
    "depth dropped for all": case(lambda: mlp(DropsDepth()), classes, None, ("random", "1")),
    "bfloat16": case(lambda: mlp().to(torch.bfloat16), classes, half_vectors, ("precision", "the gradients"), size=1),
}  # fmt: skip
