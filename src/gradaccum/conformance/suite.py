"""The scenarios: small models, sizes that divide nothing, and losses as one writes them for a whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradaccum.conformance.scenarios import BATCH, MICRO_BATCH, Batch, Scenario
from gradaccum.errors import GradAccumError

FEATURES, CLASSES, LENGTH, EXPERTS = 8, 3, 12, 4
IGNORED = -100
CLASS_WEIGHTS = (1.0, 8.0, 60.0)

_TAIL = "the last window of an epoch has 2 micro-batches, and its gradient is to be divided by their samples"


class ScenarioError(GradAccumError, KeyError):
    """There is no scenario of that name."""

    def __str__(self) -> str:  # a KeyError shows its argument's repr
        return str(self.args[0])


def scenario(name: str) -> Scenario:
    """The one of that name.

    Raises:
        ScenarioError: there is none.
    """
    found = {one.name: one for one in scenarios()}
    if name not in found:
        raise ScenarioError(f"There is no scenario {name!r}. There are: {', '.join(map(repr, found))}")
    return found[name]


def scenarios() -> tuple[Scenario, ...]:
    """All of them, the same at every call; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _made()


def _made() -> tuple[Scenario, ...]:
    num_full, num_short_window, num_short_micro_batch = 6 * BATCH, 6 * BATCH - 2 * MICRO_BATCH, 6 * BATCH - 7
    x = torch.randn(num_full, FEATURES)
    y = torch.sin(x).sum(dim=1, keepdim=True)
    mlp = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
    full = Scenario(
        name="equal micro-batches, full windows", why="nothing: here every loop is right", model=mlp, data=(x, y),
        loss=_squares,
    )  # fmt: skip

    sequences = torch.randn(num_full, LENGTH, FEATURES)
    labels = sequences[..., :CLASSES].argmax(dim=2)
    lengths = torch.randint(1, LENGTH + 1, (num_full, 1))
    masked = labels.where(torch.arange(LENGTH) < lengths, IGNORED)

    rare = (x[:, 0] > 1.5).long() + (x[:, 1] > 1.5).long()  # 0: about 87%, 1: 12%, 2: 0.4%
    classifier = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    normed = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    encoder = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, FEATURES))
    tokens = Scenario(
        name="mean over tokens, ignored labels",
        why="micro-batches have unequal numbers of tokens, and a mean of their means counts short texts' more",
        model=_Tokens(), data=(sequences, masked), loss=_token_loss, lr=0.5, bound=1e-5,
        offers={"weight": _num_tokens},
    )  # fmt: skip
    twelve = (
        full,
        full.with_rows(num_short_window, "short last window", why=_TAIL),
        full.with_rows(
            num_short_micro_batch, "short last micro-batch",
            why="the last micro-batch has 3 samples, and a mean of means counts each of them for more than 3",
        ),
        full.with_rows(2 * MICRO_BATCH, "window longer than the epoch", why=_TAIL, epochs=20),
        tokens,
        Scenario(
            name="class-weighted cross-entropy",
            why="cross-entropy with class weights is a mean over the sum of its labels' weights",
            model=classifier, data=(x, rare), loss=_class_weighted, lr=0.5, bound=1e-5,
            offers={"weight": _sum_of_class_weights},
        ),
        replace(
            full, name="clipping by norm", clip_norm=0.1, bound=1e-5, needs=frozenset({"clip_norm"}),
            why="the batch's gradient is to be clipped, once",
        ),
        full.with_rows(
            num_short_window, "schedule per update, short last window", why=_TAIL, decay=0.9,
            needs=frozenset({"scheduler"}),
        ),
        full.with_rows(
            num_short_micro_batch, "AdamW, short last micro-batch", adamw=True, lr=0.01, bound=1e-4,
            why="AdamW forgives a constant factor, and not one that differs from window to window",
        ),
        full.with_rows(
            num_short_window, "stream without a length", is_stream=True, why=f"{_TAIL}; no len() says which it is"
        ),
        replace(
            full, name="BatchNorm", model=normed, has_batch_norm=True, bound=1e-5,
            why="BatchNorm's statistics are those of a micro-batch",
        ),
        Scenario(
            name="contrastive loss", why="a sample is compared with those of its own micro-batch only",
            model=encoder, data=(x, x + 0.3 * torch.randn_like(x)), loss=_pair_loss, lr=0.5, bound=1e-5,
            offers={"forward": _outputs, "batch_loss": _pairs, "combine": "concat"},
        ),
    )  # fmt: skip
    gate = (torch.rand(num_full, 1) < torch.linspace(0.3, 1.0, num_full)[:, None]).float()
    poisoned = x.clone()
    poisoned[BATCH + 3, 2] = torch.inf  # one sample of the second batch
    is_second = torch.arange(num_full)[:, None] // BATCH % 2 == 1
    shared = masked.where((torch.arange(LENGTH) < 3) | ~is_second, IGNORED)  # the second process's texts are short
    silent = masked.clone()
    silent[2 * MICRO_BATCH : 3 * MICRO_BATCH] = IGNORED
    return (
        *twelve,
        replace(
            tokens, name="micro-batch without a token", data=(sequences, silent),
            why="a micro-batch has ignored labels only, and its mean is 0 / 0",
        ),
        Scenario(
            name="mean over a mask", why="micro-batches have unequal numbers of samples that the mask leaves",
            model=mlp, data=(x, y, gate), loss=_masked, offers={"weight": _num_unmasked},
        ),
        replace(
            full, name="sum over samples", loss=_sum_of_squares, lr=0.001, offers={"weight": _nothing},
            why="the sum of the micro-batches' sums is the batch's sum, undivided",
        ),
        replace(
            tokens, name="two terms, tokens and texts", loss=_two_terms, offers={"terms": _terms},
            why="one term is a mean over tokens, the other over texts: no single number divides both",
        ),
        Scenario(
            name="experts' balance", why="the balance is a product of two means over the batch's tokens",
            model=_Experts(), data=(sequences, labels), loss=_balanced_loss, lr=0.5,
            offers={"forward": _routing_sums, "batch_loss": _balanced, "combine": "sum"},
        ),
        tokens.with_rows(
            num_short_window, "resume inside of a window", epochs=1, stop_after=2 * 4 + 2,
            needs=frozenset({"folder", "stop_after"}),
            why="training was stopped after 2 of a window's 4 micro-batches, and went on from what was saved",
        ),
        tokens.with_rows(
            num_short_window, "reported loss", epochs=1, lr=0.0, compares="losses",
            why="what is logged for an update is to be the loss of its batch",
        ),
        replace(
            full, name="skipped update", data=(poisoned, y), epochs=1, decay=0.5,
            needs=frozenset({"scaler", "scheduler"}),
            why="one sample overflows, so its batch makes no update, and the schedule is to wait as well",
        ),
        replace(
            tokens, name="two processes, uneven shares", data=(sequences, shared), processes=2,
            needs=frozenset({"processes"}),
            why="the processes have unequal numbers of tokens, and a mean of their means counts short texts' more",
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- models
class _Tokens(nn.Module):
    """Logits ``[rows, classes, length]``, as cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(1, 2)


class _Experts(nn.Module):
    """Each token goes to one expert; returns logits ``[tokens, classes]`` and the router's ``[tokens, experts]``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        routed = self.router(tokens).softmax(-1)
        best = routed.max(-1)
        outputs = torch.stack([expert(tokens) for expert in self.experts], 1)
        chosen = outputs[torch.arange(len(tokens)), best.indices]
        return chosen * best.values[:, None], routed


# ------------------------------------------------------------------------------------------------------------- losses
def _squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _sum_of_squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


def _nothing(batch: Batch) -> None:
    return None


def _token_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=IGNORED)


def _num_tokens(batch: Batch) -> Tensor:
    return (batch[1] != IGNORED).sum()


def _class_weighted(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(output, batch[1], weight=output.new_tensor(CLASS_WEIGHTS))


def _sum_of_class_weights(batch: Batch) -> Tensor:
    return torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)[batch[1]].sum()


def _masked(model: nn.Module, batch: Batch) -> Tensor:
    x, y, gate = batch
    return ((model(x) - y).square() * gate).sum() / gate.sum()


def _num_unmasked(batch: Batch) -> Tensor:
    return batch[2].sum()


def _terms(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Any]]:
    logits = model(batch[0])
    return {
        "tokens": (F.cross_entropy(logits, batch[1], ignore_index=IGNORED), _num_tokens(batch)),
        "texts": (logits.square().mean(), len(logits)),
    }


def _two_terms(model: nn.Module, batch: Batch) -> Tensor:
    return sum((mean for mean, _ in _terms(model, batch).values()), torch.zeros(()))


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def _pairs(outputs: Tensor, batch: Batch) -> Tensor:
    """InfoNCE: every sample's positive is its own target, all other targets of the batch are its negatives."""
    similarity = F.normalize(outputs, dim=1) @ F.normalize(batch[1], dim=1).T
    return F.cross_entropy(similarity / 0.1, torch.arange(len(outputs)))


def _pair_loss(model: nn.Module, batch: Batch) -> Tensor:
    return _pairs(model(batch[0]), batch)


def _routing_sums(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the loss is made of, as sums over tokens: they add up over micro-batches."""
    logits, routed = model(batch[0])
    return {
        "loss": F.cross_entropy(logits, batch[1].flatten(), reduction="sum"),
        "tokens": logits.new_tensor(len(logits)),
        "chosen": F.one_hot(routed.argmax(-1), EXPERTS).to(routed).sum(0),
        "probability": routed.sum(0),
    }


def _balanced(sums: dict[str, Tensor], batch: Any) -> Tensor:
    """The balance of Switch, Mixtral and Qwen-MoE: experts times the product of shares and mean probabilities."""
    balance = EXPERTS * (sums["chosen"] / sums["tokens"] * (sums["probability"] / sums["tokens"])).sum()
    return sums["loss"] / sums["tokens"] + 0.5 * balance


def _balanced_loss(model: nn.Module, batch: Batch) -> Tensor:
    return _balanced(_routing_sums(model, batch), batch)
