"""Small models that draw in their forward, in every way that training knows; `STOCHASTIC` by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS, LENGTH, WIDTH = 7, 3, 8
"""Micro-batches of 3 rows have as many rows as positions: a shape alone does not tell where the samples are."""


class Network(nn.Module):
    """Two layers with what is drawn between them."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(WIDTH, WIDTH), between or nn.Identity(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


class Recurrent(nn.Module):
    """Its draws have time first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class DropPath(nn.Module):
    """Drops a whole branch of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1.5 * x.tanh() * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(0.6)


class FoldedHeads(nn.Module):
    """Attention whose heads are folded into the batch, with dropout of its weights and of positions for all alike."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = x.view(rows, length, 2, -1).transpose(1, 2).reshape(rows * 2, length, -1)
        mixed = F.dropout((heads @ heads.mT).softmax(-1), 0.3) @ heads
        x = mixed.view(rows, 2, length, -1).transpose(1, 2).reshape(x.shape)
        return x + F.dropout(torch.ones(1, length, 1), 0.3)


class Checkpointed(nn.Module):
    """Runs its inner layers again in the backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Noisy(nn.Module):
    """One draw of each of torch's distributions."""

    def forward(self, x: Tensor) -> Tensor:
        like = torch.empty_like(x)
        x = x + 0.1 * torch.normal(x.detach(), 0.5) + 0.1 * torch.normal(0.0, x.detach().clamp(-3, 3).exp())
        x = x + like.exponential_(2.0) + 0.1 * like.clone().uniform_(-1, 1) + 0.1 * like.clone().cauchy_().clamp(-1, 1)
        x = x + 0.1 * like.clone().geometric_(0.4) + 0.1 * like.clone().log_normal_(0.0, 0.3)
        x = x * torch.bernoulli(x.detach().sigmoid()) + 0.1 * like.clone().random_(0, 3)
        x = F.alpha_dropout(x, 0.2) + F.rrelu(x, training=True)
        x = (
            x
            + 0.1 * torch.poisson(x.detach().clamp(-3, 3).exp())
            + 0.1 * torch.distributions.Gamma(x.detach().clamp(-3, 3).exp(), 1.0).sample()
        )
        chosen = torch.multinomial(x.detach().clamp(-3, 3).exp().flatten(1), 2) + torch.randint_like(like, 4)[:, 0, :2]
        return (torch.feature_dropout(x, 0.2, True) * torch.rand(()) + chosen.sum(1)[:, None, None] * 0.01).tanh()


def regression(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def masked_autoencoder(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    hidden = torch.rand(x.shape[:2]).argsort(1) < 1
    return (model(x * ~hidden[..., None]) - x).square().mean()


def diffusion(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    t = torch.randint(1, 10, (len(x),))
    noise = torch.randn_like(x)
    level = (t / 10)[:, None, None]
    return F.mse_loss(model((1 - level).sqrt() * x + level.sqrt() * noise), noise)


def variational(model: nn.Module, batch: Any) -> Tensor:
    mean = model.first(batch[0])
    z = torch.distributions.Normal(mean, 0.5).rsample()
    return F.mse_loss(model.last(z), batch[0]) + 0.1 * mean.square().mean()


def mixup(model: nn.Module, batch: Any) -> Tensor:
    """Mixes the positions of a sample, with a share and a permutation that all samples have in common."""
    x, y = batch
    share, order = torch.rand(()), torch.randperm(LENGTH)
    return F.mse_loss(model(share * x + (1 - share) * x[:, order]), share * y + (1 - share) * y[:, order])


def experts(model: nn.Module, batch: Any) -> Tensor:
    """Routes jittered tokens to one of two layers; all tokens are in one dimension."""
    x = batch[0].flatten(0, 1)
    jitter = torch.empty_like(x).uniform_(0.5, 1.5)
    to_first = ((x * jitter).sum(1) > 0)[:, None]
    return F.mse_loss(torch.where(to_first, model.first(x), model.last(x)), batch[1].flatten(0, 1))


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    made = model(torch.randn(len(batch[0]), LENGTH, WIDTH))
    return F.softplus(-made.sum((1, 2))).mean() + F.mse_loss(made, batch[1])


@dataclass(frozen=True)
class Case:
    """A model, its loss, and what the library is to warn of."""

    make: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor] = regression


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=True)
    return Network(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _sequence_first() -> nn.Module:
    class SequenceFirst(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(src.transpose(0, 1)).transpose(0, 1)

    return Network(SequenceFirst(WIDTH, 2, 16, dropout=0.3))


STOCHASTIC: dict[str, Case] = {
    "transformer": Case(_transformer),
    "sequence first": Case(_sequence_first),
    "folded heads": Case(lambda: Network(FoldedHeads())),
    "drop path": Case(lambda: Network(DropPath())),
    "lstm": Case(lambda: Network(Recurrent())),
    "checkpoint": Case(lambda: Network(Checkpointed(reentrant=False))),
    "reentrant checkpoint": Case(lambda: Network(Checkpointed(reentrant=True))),
    "every distribution": Case(lambda: Network(Noisy())),
    "masked autoencoder": Case(Network, masked_autoencoder),
    "diffusion": Case(Network, diffusion),
    "variational": Case(Network, variational),
    "mixup": Case(Network, mixup),
    "experts": Case(Network, experts),
    "adversarial": Case(Network, adversarial),
}


def make_model(case: Case) -> nn.Module:
    """The case's model in float64, from seed 0."""
    torch.manual_seed(0)
    return case.make().double()


def make_batches(updates: int, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets, in float64."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(rows, LENGTH, WIDTH, dtype=torch.float64, generator=generator),
            torch.randn(rows, LENGTH, WIDTH, dtype=torch.float64, generator=generator),
        )
        for _ in range(updates)
    ]
