"""A remedy that is printed was run, and following it makes the audit say exact; none is printed that does not help."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
import zoo

ROUNDING = 1e-12


def conv_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5, zoo.CLASSES))


def signals() -> tuple[Tensor, Tensor]:
    return torch.randn(13, 3, 7), torch.arange(13) % zoo.CLASSES


@pytest.mark.parametrize("batch_norm", ["exact", "frozen", ga.GhostBatch(3)])
def test_batch_norm_options_can_be_audited(batch_norm: Any) -> None:
    model, batch = conv_norm(nn.BatchNorm1d(4)), signals()
    [culprit] = ga.audit(model, zoo.classes, batch, 4).culprits
    assert culprit.remedy.startswith('ga.TrainStep(model, optimizer, loss_fn, batch_norm="exact"); when fine-tuning')
    assert 'with "exact" the gradient is the whole batch' in culprit.tried
    report = ga.audit(model, zoo.classes, batch, 4, batch_norm=batch_norm)
    assert report.exact, str(report)
    assert report.relative_error < ROUNDING


def test_an_option_that_does_not_reach_a_layer_is_not_printed() -> None:
    class Own(nn.BatchNorm1d):
        """Its own forward, without ``F.batch_norm``."""

        def forward(self, input: Tensor) -> Tensor:
            x = input
            mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), keepdim=True)
            return (x - mean) / (var + self.eps).sqrt()

    [culprit] = ga.audit(conv_norm(Own(4)), zoo.classes, signals(), 4).culprits
    assert (culprit.kind, culprit.where) == ("batch-norm", "1")
    assert "exact" not in culprit.remedy
    assert '"exact" is refused' in culprit.tried
    with pytest.raises(ga.UnsupportedError, match="a BatchNorm with a forward of its own"):
        ga.audit(conv_norm(Own(4)), zoo.classes, signals(), 4, batch_norm="exact")


def test_lockstep_can_be_audited() -> None:
    class Attends(nn.Module):
        def __init__(self, gathers: bool) -> None:
            super().__init__()
            self.gathers = gathers

        def forward(self, x: Tensor) -> Tensor:
            others = ga.gather(x) if self.gathers else x
            return x + (x @ others.T).softmax(-1) @ others

    [culprit] = ga.audit(zoo.mlp(Attends(True)), zoo.classes, zoo.vectors(), 4).culprits
    assert "lockstep=True" in culprit.remedy
    assert ga.audit(zoo.mlp(Attends(True)), zoo.classes, zoo.vectors(), 4, lockstep=True).exact
    without = ga.audit(zoo.mlp(Attends(False)), zoo.classes, zoo.vectors(), 4, lockstep=True)
    assert [culprit.where for culprit in without.culprits] == ["1"]
    both = ga.audit(zoo.mlp(Attends(True), Attends(False)), zoo.classes, zoo.vectors(), 4, lockstep=True)
    assert "2" in [culprit.where for culprit in both.culprits]  # nothing of it can be taken out, so both are named


def test_two_means_in_one_loss_are_terms_and_couple_nothing() -> None:
    def both(model: Any, batch: Any) -> Tensor:
        made = model(batch[0])
        return F.cross_entropy(made.transpose(1, 2), batch[1]) + 0.1 * made.logsumexp(-1).square().mean()

    model, batch = zoo._TOKENS(), zoo.sequences()
    [culprit] = ga.audit(model, both, batch, 4).culprits
    assert culprit.kind == "loss-weight"
    assert "weights=lambda batch: {'first': (batch[1] != -100).sum(), 'second': len(batch[0])}" in culprit.remedy
    assert "was right on all" in culprit.tried

    def terms(model: Any, batch: Any) -> Any:
        made = model(batch[0])
        first = F.cross_entropy(made.transpose(1, 2), batch[1])
        return {"first": first, "second": 0.1 * made.logsumexp(-1).square().mean()}

    told = ga.audit(
        model, terms, batch, 4, weights=lambda batch: {"first": (batch[1] != -100).sum(), "second": len(batch[0])}
    )
    assert told.exact, str(told)


class Injects(torch.autograd.Function):
    """Adds the gradient of an auxiliary loss in the backward."""

    @staticmethod
    def forward(ctx: Any, chances: Tensor, aux: Tensor) -> Tensor:
        ctx.save_for_backward(aux)
        return chances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.ones_like(ctx.saved_tensors[0])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(zoo.FEATURES, 4)
        self.experts = nn.Linear(zoo.FEATURES, 4 * zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        chances = Injects.apply(chances, 0.5 * chances.square().sum(-1).mean())
        return (chances[..., None] * self.experts(x).unflatten(-1, (4, -1))).sum(-2)


@pytest.mark.parametrize(("loss", "batch"), [(zoo.classes, zoo.vectors), (zoo.tokens_told, zoo.sequences)])
def test_an_injected_gradient_is_named_and_not_the_loss(loss: Any, batch: Any) -> None:
    [culprit] = ga.audit(Routed(), loss, batch(), 4).culprits
    assert (culprit.kind, culprit.where) == ("unknown", "router")
    assert "batch_loss" not in culprit.remedy
    assert culprit.tried.startswith("not tried")


def test_a_layer_that_is_set_up_by_what_it_sees_first() -> None:
    class ActNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8))
            self.register_buffer("is_ready", torch.tensor(False))

        def forward(self, x: Tensor) -> Tensor:
            if not self.is_ready:
                self.shift.data.copy_(-x.mean(0))
                self.is_ready.fill_(True)
            return x + self.shift

    model: Any = zoo.mlp(ActNorm())
    batch = zoo.vectors()
    report = ga.audit(model, zoo.classes, batch, 4)
    assert [(culprit.kind, culprit.where) for culprit in report.culprits] == [("buffer", "1")]
    assert "run one forward" in report.culprits[0].remedy
    assert "the gradient is the whole batch's" in report.culprits[0].tried
    assert not model[1].shift.any()
    with torch.no_grad():
        model(batch[0])
    assert ga.audit(model, zoo.classes, batch, 4).exact


def test_a_recurrent_layer_with_time_first() -> None:
    class Reads(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(zoo.FEATURES, 4, **options), nn.Linear(4, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    [culprit] = ga.audit(Reads(), zoo.tokens_told, zoo.sequences(), 4).culprits
    assert (culprit.where, "batch_first=True" in culprit.remedy) == ("rnn", True)
    assert ga.audit(Reads(batch_first=True), zoo.tokens_told, zoo.sequences(), 4).exact


def test_spectral_norm_was_tried_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(zoo.FEATURES, 8)), nn.Linear(8, 3))
    [culprit] = ga.audit(model, zoo.classes, zoo.vectors(), 4).culprits
    assert culprit.kind == "buffer"
    assert "module.eval() while the batch is accumulated" in culprit.remedy
    assert "the gradient is the whole batch's" in culprit.tried


def test_sums_in_bfloat16_were_tried_in_float32() -> None:
    report = ga.audit(zoo.mlp().to(torch.bfloat16), zoo.classes, zoo.half_vectors(), 1)
    [culprit] = report.culprits
    assert culprit.kind == "precision"
    assert "sums in float32 are off by" in culprit.tried
    wide = ga.audit(zoo.mlp().to(torch.bfloat16), zoo.classes, zoo.half_vectors(), 1, accumulate_dtype=torch.float32)
    assert wide.own_error is not None
    assert report.own_error is not None
    assert wide.own_error < report.own_error
