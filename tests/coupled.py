"""Losses that couple the samples of a batch, each as a user writes it for the whole batch.

Each is a `Coupled`: what a model's outputs are for a micro-batch, the loss over all outputs, and the batch it is for.
The oracle runs the very same functions on the whole batch: ``batch_loss(forward(model, batch), batch)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniglot import CHARACTERS, omniglot

ROWS = 13
FEATURES = 6

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Coupled:
    """One loss over the batch."""

    forward: Callable[[nn.Module, Batch], Any]
    batch_loss: Callable[[Any, Batch], Tensor]
    batch: Batch
    combine: Literal["concat", "sum"] = "concat"
    outputs: int = 5


class Encoder(nn.Module):
    """Images or features to vectors; dropout included, at a rate that tests set."""

    def __init__(self, features: int, outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, 16)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.dropout(torch.tanh(self.hidden(x.flatten(1))))))


def model_for(case: Coupled, *, dropout: float = 0.0) -> Encoder:
    """A new encoder for a case, in float64, the same each time."""
    torch.manual_seed(7)
    return Encoder(case.batch["x"][0].numel(), case.outputs, dropout=dropout).double()


def _images(rows: int, seed: int) -> Batch:
    """Two drawings each of some characters, which character it is, and how much ink it has."""
    made = torch.Generator().manual_seed(seed)
    characters = torch.randint(0, 5, (rows,), generator=made)
    drawers = torch.randint(0, 10, (rows,), generator=made)
    images = omniglot()[:CHARACTERS, :, 4:24:2, 4:24:2]  # every other pixel of the middle
    x = images[characters, drawers]
    return {"x": x, "second": images[characters, drawers + 10], "label": characters, "ink": x.mean(dim=(1, 2))}


def _features(rows: int, seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, FEATURES, generator=made, dtype=torch.float64),
        "second": torch.randn(rows, FEATURES, generator=made, dtype=torch.float64),
        "time": torch.rand(rows, generator=made, dtype=torch.float64),
        "event": torch.rand(rows, generator=made) < 0.7,
    }


def _views(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), model(batch["second"])


def _embedding(model: nn.Module, batch: Batch) -> Tensor:
    return F.normalize(model(batch["x"]), dim=-1)


def contrastive(outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """InfoNCE in both directions, as CLIP's (Radford et al. 2021)."""
    one, other = (F.normalize(output, dim=-1) for output in outputs)
    similar = one @ other.T / 0.1
    labels = torch.arange(len(one))
    return (F.cross_entropy(similar, labels) + F.cross_entropy(similar.T, labels)) / 2


class Temperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        one, other = outputs
        return F.cross_entropy(one @ other.T * self.log_scale.exp(), torch.arange(len(one)))


def supervised_contrastive(output: Tensor, batch: Batch) -> Tensor:
    """Khosla et al. 2020, over samples that have a partner."""
    similar = output @ output.T / 0.2
    others = ~torch.eye(len(output), dtype=torch.bool)
    alike = (batch["label"][:, None] == batch["label"]) & others
    log_share = similar - similar.masked_fill(~others, -torch.inf).logsumexp(dim=1, keepdim=True)
    counts = alike.sum(dim=1)
    return -((log_share * alike).sum(dim=1)[counts > 0] / counts[counts > 0]).mean()


def triplet(output: Tensor, batch: Batch) -> Tensor:
    """The hardest positive and negative in the batch (Hermans et al. 2017)."""
    distance = (output[:, None] - output).square().sum(dim=-1).add(1e-9).sqrt()
    alike = batch["label"][:, None] == batch["label"]
    hardest_positive = distance.masked_fill(~alike, -torch.inf).amax(dim=1)
    hardest_negative = distance.masked_fill(alike, torch.inf).amin(dim=1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def _dice_statistics(model: nn.Module, batch: Batch) -> Tensor:
    probabilities = model(batch["x"]).sigmoid()
    ink = batch["second"].flatten(1)
    return torch.stack([(probabilities * ink).sum(), probabilities.sum() + ink.sum()])


def dice(statistics: Tensor, batch: Batch) -> Tensor:
    """One minus the overlap over all pixels of the batch (Milletari et al. 2016)."""
    overlap, total = statistics
    return 1 - 2 * overlap / total


def _moments(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    y, t = model(batch["x"])[:, 0], batch["ink"]
    return {"y": y.sum(), "t": t.sum(), "yy": (y * y).sum(), "tt": (t * t).sum(), "yt": (y * t).sum()}


def concordance(sums: dict[str, Tensor], batch: Batch) -> Tensor:
    """One minus Lin's concordance correlation coefficient (1989), from sums."""
    n = len(batch["x"])
    mean_y, mean_t = sums["y"] / n, sums["t"] / n
    covariance = sums["yt"] / n - mean_y * mean_t
    spread = sums["yy"] / n - mean_y**2 + sums["tt"] / n - mean_t**2
    return 1 - 2 * covariance / (spread + (mean_y - mean_t) ** 2)


def barlow_twins(outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """Zbontar et al. 2021."""
    one, other = ((output - output.mean(0)) / output.std(0) for output in outputs)
    correlation = one.T @ other / len(one)
    wanted = torch.eye(len(correlation), dtype=one.dtype)
    return ((correlation - wanted).square() * torch.where(wanted == 1, 1.0, 0.005)).sum()


def vicreg(outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """Bardes et al. 2022: invariance, variance, covariance."""
    loss = 25 * F.mse_loss(*outputs)
    for output in outputs:
        centred = output - output.mean(0)
        covariance = centred.T @ centred / (len(output) - 1)
        loss = loss + 25 * F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + (covariance - covariance.diagonal().diag()).square().sum() / output.shape[1]
    return loss


def cox(output: Tensor, batch: Batch) -> Tensor:
    """The negative partial log-likelihood (Cox 1972; Katzman et al. 2018): each event against all still at risk."""
    risk = output[:, 0]
    at_risk = batch["time"] >= batch["time"][:, None]
    total = risk.expand(len(risk), -1).masked_fill(~at_risk, -torch.inf).logsumexp(dim=1)
    return -(risk - total)[batch["event"]].mean()


def _routing(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    probabilities = model(batch["x"]).softmax(dim=-1)
    chosen = F.one_hot(probabilities.argmax(dim=-1), probabilities.shape[-1])
    return {"chosen": chosen.sum(0), "probability": probabilities.sum(0)}


def load_balance(sums: dict[str, Tensor], batch: Batch) -> Tensor:
    """Experts times the sum of (share of samples * mean probability) (Fedus et al. 2022, equation 4)."""
    n = len(batch["x"])
    return len(sums["chosen"]) * (sums["chosen"] / n * sums["probability"] / n).sum()


IMAGES = _images(ROWS, 0)
POINTS = _features(ROWS, 1)

COUPLED = {
    "contrastive": Coupled(_views, contrastive, IMAGES),
    "supervised contrastive": Coupled(_embedding, supervised_contrastive, IMAGES),
    "triplet": Coupled(_embedding, triplet, IMAGES),
    "Dice": Coupled(_dice_statistics, dice, IMAGES, "sum", outputs=100),
    "concordance": Coupled(_moments, concordance, IMAGES, "sum"),
    "Barlow Twins": Coupled(_views, barlow_twins, IMAGES),
    "VICReg": Coupled(_views, vicreg, POINTS),
    "Cox": Coupled(lambda model, batch: model(batch["x"]), cox, POINTS),
    "load balance": Coupled(_routing, load_balance, POINTS, "sum"),
}
