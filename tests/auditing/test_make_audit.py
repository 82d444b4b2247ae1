"""`ga.audit` on the zoo: right about what is exact, and about who is to blame where it is not."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
import zoo

# Both sides add up the same few thousand products in float64 in another order: 2**-53 = 1.1e-16 each.
ROUNDING = 1e-13


# What the remedy says, of the first culprit.
REMEDIES = {
    "batch norm": 'batch_norm="exact"',
    "contrastive": "forward=forward, batch_loss=batch_loss",
    "root of a mean": 'combine="sum"',
    "mean over tokens": "ga.criterion(nn.CrossEntropyLoss(...))(output, target)",
    "mean over a mask": "ga.Loss.sum(losses.sum(), over=count)",
    "sum": "return ga.Loss.sum(loss)",
    "means added up": "return the loss as a plain tensor",
    "mixup": "draw it for each sample",
    "attention over the batch": "lockstep=True",
    "spectral norm": "advance it once an update",
    "bfloat16": "accumulate_dtype=torch.float32",
}
assert REMEDIES.keys() <= zoo.INEXACT.keys()


def audited(case: zoo.Case) -> ga.Report:
    return ga.audit(case.model(), case.loss, case.batch(), case.size, **case.options())


def blamed(report: ga.Report) -> list[tuple[str, str]]:
    return [(culprit.kind, culprit.where) for culprit in report.culprits]


@pytest.mark.parametrize("case", zoo.EXACT.values(), ids=zoo.EXACT.keys())
def test_what_is_exact(case: zoo.Case) -> None:
    report = audited(case)
    assert report.exact, str(report)
    assert report.relative_error < ROUNDING
    assert report.dtype == "float64"
    assert report.culprits == report.not_checked == ()
    assert {one.verdict for one in report.parameters} <= {"equal", "rounding"}
    report.raise_if_inexact()


@pytest.mark.parametrize("name", zoo.INEXACT)
def test_who_is_to_blame_and_what_to_type(name: str) -> None:
    report = audited(zoo.INEXACT[name])
    assert set(blamed(report)) == zoo.INEXACT[name].culprits, str(report)
    assert REMEDIES.get(name, "") in report.culprits[0].remedy
    assert not report.exact
    assert all(culprit.error > 0 and culprit.remedy and culprit.price for culprit in report.culprits)
    with pytest.raises(ga.InexactError, match=r"^(Not exact|Exact in float64, and not in bfloat16)"):
        report.raise_if_inexact()


def test_the_error_is_that_of_training() -> None:
    """Held against plain torch, in float64, without anything of the library."""
    torch.manual_seed(1)
    model = zoo.mlp(nn.BatchNorm1d(8)).double()
    x, y = zoo.vectors(12)
    x = x.double()

    def gradient(sizes: list[int]) -> Tensor:
        model.zero_grad()
        for inputs, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            (F.cross_entropy(model(inputs), labels) * len(inputs) / len(x)).backward()
        return nn.utils.parameters_to_vector([one.grad for one in model.parameters()])  # type: ignore[misc]

    report = ga.audit(model, zoo.classes, (x, y), micro_batch_size=5)
    assert report.micro_batch_sizes == (5, 4, 3)
    whole = gradient([12])
    expected = (gradient([5, 4, 3]) - whole).norm() / whole.norm()
    assert report.relative_error == pytest.approx(expected.item(), rel=1e-9)
    assert report.culprits[0].error == pytest.approx(report.relative_error, rel=1e-6)  # a single one makes all of it


def test_the_remedy_for_a_loss_inside_of_the_model_names_the_count() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(zoo.FEATURES, zoo.CLASSES)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            losses = F.cross_entropy(self.head(x).transpose(1, 2), labels, reduction="sum")
            return {"loss": losses / max(int((labels != -100).sum()), 1)}

    x, labels = zoo.sequences()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(batch["x"], batch["labels"])["loss"].clone().exp().log()  # nothing of it in the last nodes

    [culprit] = ga.audit(WithLoss(), loss_fn, {"x": x, "labels": labels}, 4).culprits
    assert (culprit.kind, culprit.where) == ("loss-weight", "the loss")
    assert culprit.remedy == "return ga.Loss.mean(loss, over=(micro_batch['labels'] != -100).sum())"

    def told(model: Any, batch: Any) -> ga.Loss:
        return ga.Loss.mean(loss_fn(model, batch), over=(batch["labels"] != -100).sum())

    assert ga.audit(WithLoss(), told, {"x": x, "labels": labels}, 4).exact


def test_equal_micro_batches_show_a_constant_factor() -> None:
    report = ga.audit(zoo.mlp(), zoo.sum_of_means, zoo.vectors(16), micro_batch_size=4)
    assert report.micro_batch_sizes == (4, 4, 4, 4)
    assert {one.verdict for one in report.parameters} == {"scaled"}
    assert "4.000, the number of micro-batches" in str(report)


def test_what_equal_micro_batches_hide_is_found_all_the_same() -> None:
    def mean_of_means(model: Any, batch: Any) -> ga.Loss:
        return ga.Loss.mean(zoo.classes(model, batch), over=1)

    report = ga.audit(zoo.mlp(), mean_of_means, zoo.vectors(16), micro_batch_size=4)
    assert report.equal_sizes_error < ROUNDING < 1e-3 < report.relative_error
    assert len(set(report.micro_batch_sizes)) > 1
    assert [culprit.kind for culprit in report.culprits] == ["loss-weight"]
    assert "it is a short one that shows the difference" in " ".join(str(report).split())


def test_a_division_by_the_number_of_micro_batches_is_noted() -> None:
    def divided(model: Any, batch: Any) -> Tensor:
        return zoo.classes(model, batch) / 4

    report = ga.audit(zoo.mlp(), divided, zoo.vectors(16), micro_batch_size=4)
    assert report.exact  # here as there: but hardly what was meant
    assert "divided by 4, the number of micro-batches" in report.notes[0]
    assert ga.audit(zoo.mlp(), divided, zoo.vectors(16), micro_batch_size=8).notes == ()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_replayed_when_activations_are_computed_again(reentrant: bool) -> None:
    stem = nn.Linear(zoo.FEATURES, 8)
    body = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def loss_fn(models: Any, batch: Any) -> Tensor:
        return F.cross_entropy(checkpoint(body, stem(batch[0]), use_reentrant=reentrant), batch[1])

    report = ga.audit([stem, body], loss_fn, zoo.vectors(), 4)
    assert report.exact, str(report)


def test_a_compiled_model() -> None:
    model: Any = torch.compile(zoo.mlp(nn.Dropout(0.5)), backend="eager")
    assert ga.audit(model, zoo.classes, zoo.vectors(), 4).exact


def test_several_models() -> None:
    encoder, head = nn.Linear(zoo.FEATURES, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, zoo.CLASSES))

    def loss_fn(models: Any, batch: Any) -> Tensor:
        return F.cross_entropy(models[1](models[0](batch[0])), batch[1])

    assert blamed(ga.audit([encoder, head], loss_fn, zoo.vectors(), 4)) == [("batch-norm", "1.0")]


def test_many_batch_norms_are_all_named() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(10)], nn.Linear(6, 3))
    report = ga.audit(model, zoo.classes, zoo.vectors(), 4)
    assert [culprit.where for culprit in report.culprits] == [f"{i}.1" for i in range(10)]
    assert "and 5 more" in str(report)


def test_a_model_that_cannot_run_in_float64_is_compared_in_its_own_dtype() -> None:
    class Stubborn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("only float32 is supported")
            return self.inner(x)

    report = ga.audit(Stubborn(zoo.mlp(nn.BatchNorm1d(8))), zoo.classes, zoo.vectors(), 4)
    assert (report.dtype, report.own_error) == ("float32", None)
    assert "only float32 is supported" in report.not_checked[0]
    assert blamed(report) == [("batch-norm", "inner.1")]
    report = ga.audit(Stubborn(zoo.mlp()), zoo.classes, zoo.vectors(), 4)
    assert report.exact
    assert "Not checked: float64" in str(report)


def test_hooks_on_parameters_are_not_checked() -> None:
    model = zoo.mlp()
    next(model.parameters()).register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    report = ga.audit(model, zoo.classes, zoo.vectors(), 4)
    assert report.exact
    assert report.not_checked[0].startswith("hooks on parameters (0.weight)")


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((zoo.FEATURES,), 1 + 1j, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_complex_parameters() -> None:
    def apart(model: Any, batch: Any) -> Tensor:
        return model(batch[0]).abs().square().mean()

    def coupled(model: Any, batch: Any) -> Tensor:
        made = model(batch[0])
        return made.real.square().mean() + made.imag.mean(0).square().sum()

    assert ga.audit(Complex(), apart, zoo.vectors(), 4).exact
    report = ga.audit(Complex(), coupled, zoo.vectors(), 4)
    assert blamed(report) == [("coupled-loss", "the loss")]
    assert report.relative_error > 0.1


def test_autocast_is_as_it_is_in_the_models_own_dtype() -> None:
    model, batch = zoo.mlp(), zoo.vectors()
    plain = ga.audit(model, zoo.classes, batch, 4)
    with torch.autocast("cpu", torch.bfloat16):
        report = ga.audit(model, zoo.classes, batch, 4)
    assert report.exact, str(report)
    assert (report.dtype, report.own_dtype, report.autocast) == ("float64", "float32", "bfloat16")
    assert report.relative_error < ROUNDING
    assert plain.own_error is not None
    assert report.own_error is not None
    assert plain.own_error < 1e-5 < 1e-4 < report.own_error
    assert "own dtype under autocast to bfloat16" in " ".join(str(report).split())


def test_eval_mode_and_a_whole_batch_are_noted() -> None:
    report = ga.audit(zoo.mlp(nn.BatchNorm1d(8)).eval(), zoo.classes, zoo.vectors(), 64)
    assert report.exact
    assert report.micro_batch_sizes == (7, 6)
    assert [note.split(",")[0] for note in report.notes] == [
        "the model is in eval mode",
        "micro_batch_size=64 takes the whole batch in one piece; it was cut all the same.",
    ]


def test_the_report_is_frozen() -> None:
    report = audited(zoo.EXACT["mlp"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.exact = False  # type: ignore[misc]


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"micro_batch_size": 0}, ga.WindowError, "micro_batch_size=0: it is"),
    ({"loss_fn": None}, ga.WindowError, r"Pass loss_fn\(model, micro_batch\)"),
    ({"forward": zoo.outputs}, ga.WindowError, "say two things"),
    ({"batch": zoo.vectors(1)}, ga.BatchError, "has 1 row, which cannot be cut"),
    ({"model": "model"}, ga.ParameterError, "must be a torch Module"),
    ({"model": zoo.mlp().requires_grad_(False)}, ga.ParameterError, "none of the 4 parameters requires a gradient"),
    ({"model": nn.LazyLinear(3)}, ga.ParameterError, "have no shape yet"),
    ({"loss_fn": lambda model, batch: model(batch[0])}, ga.LossError, "shape"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE)
def test_misuse(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"model": zoo.mlp(), "loss_fn": zoo.classes, "batch": zoo.vectors()}
    with pytest.raises(error, match=message):
        ga.audit(**{**right, **arguments})


# ------------------------------------------------------------------------------------------ state that forwards advance
class Centres(nn.Module):
    """Takes off a running mean that has seen these very samples: it couples them, and it advances."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class Whitens(nn.Module):
    """Divides by what has been added up before: it ends where the whole batch's does, and is another on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("squares", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        white = x / self.squares.sqrt()
        self.squares = self.squares + x.detach().square().sum(0)
        return white


@pytest.mark.parametrize(
    ("layer", "expected"), [(Centres, {("unknown", "1"), ("buffer", "1")}), (Whitens, {("buffer", "1")})]
)
def test_a_layer_is_blamed_for_its_state(layer: type[nn.Module], expected: set[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), layer())
    batch = torch.randn(53, 5), torch.randint(3, (53,))
    report = ga.audit(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch, micro_batch_size=8)
    assert set(blamed(report)) == expected, str(report)
    assert "is written in eval mode too" in next(one for one in report.culprits if one.kind == "buffer").remedy
