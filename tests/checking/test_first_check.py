"""The look before the first update: what it finds, what it does not blame, and what it says."""

import itertools
import logging
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

ROWS, FEATURES, CLASSES, LENGTH = 24, 5, 4, 7
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (ROWS, LENGTH), generator=generator)
    for row, length in enumerate(itertools.islice(itertools.cycle((1, 7, 2, 5, 3)), ROWS)):
        labels[row, length:] = -100
    return {
        "x": torch.randn(ROWS, LENGTH, FEATURES, generator=generator),
        "labels": labels,
        "target": torch.randint(CLASSES, (ROWS,), generator=generator),
    }


def run(
    loss_fn: Callable[[Any, Batch], Any], model: nn.Module | None = None, size: int = 8, **options: Any
) -> tuple[str, list[warnings.WarningMessage]]:
    """One update; the plan line's evidence, and the warnings."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES) if model is None else model
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=size, **options)
    lines = _Lines()
    logger = logging.getLogger("gradaccum")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(make_batch())
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    return next(line for line in lines.lines if line.startswith("batch")).split(" | ")[1], caught


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"].mean(1))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(pooled(model, batch), batch["target"])


def tokens(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["labels"])


# ------------------------------------------------------------------------------------------------ what is an error
class Opaque(torch.autograd.Function):
    """The shape of a fused kernel: nothing of what it averages is in the graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def pairs(model: nn.Module, batch: Batch) -> Tensor:
    chosen, rejected = pooled(model, batch).sum(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def contrastive(model: nn.Module, batch: Batch) -> Tensor:
    first, second = model(batch["x"][:, 0]), model(batch["x"][:, 1])
    return F.cross_entropy(first @ second.T, torch.arange(len(first)))


def two_means(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch["x"])
    return F.cross_entropy(scores.transpose(1, 2), batch["labels"]) + 0.1 * scores.logsumexp(-1).square().mean()


SUM = lambda m, b: F.cross_entropy(pooled(m, b), b["target"], reduction="sum")  # noqa: E731
DROPOUT = nn.Dropout(0.5)
COUNT = r"ga\.Loss\.mean\(loss, over=\(batch\['labels'\] != -100\)\.sum\(\)\)"
WRONG: dict[str, tuple[Callable[[Any, Batch], Any], str]] = {
    "a sum": (SUM, r"return ga\.Loss\.sum\(loss\)"),
    "a sum over a fixed number": (lambda m, b: SUM(m, b) / ROWS, r"return ga\.Loss\.sum\(loss\)"),
    "a mean over tokens": (tokens, COUNT),
    "the same, half of it": (lambda m, b: tokens(m, b) / 2, COUNT),
    "the same in nan_to_num": (lambda m, b: tokens(m, b).nan_to_num(), COUNT),
    "the same in where": (lambda m, b: torch.where(tokens(m, b) < 1e9, tokens(m, b), 0.0), COUNT),
    "the same, opaque": (lambda m, b: Opaque.apply(tokens(m, b)), COUNT),
    "the same, compiled": (torch.compile(tokens, backend="eager"), COUNT),
    "the same, with dropout": (lambda m, b: tokens(m, {**b, "x": DROPOUT(b["x"])}), COUNT),
    "a sum, with dropout": (lambda m, b: SUM(m, {**b, "x": DROPOUT(b["x"])}), r"return ga\.Loss\.sum\(loss\)"),
    "a wrong count": (lambda m, b: ga.Loss.mean(tokens(m, b), over=b["labels"].numel()), COUNT),
    "RMSE": (lambda m, b: pooled(m, b).square().mean().sqrt(), "function of a sum over all samples"),
    "a variance": (lambda m, b: pooled(m, b).var(0).sum(), "couples samples"),
    "in-batch negatives": (contrastive, r"couples samples.*batch_loss=batch_loss"),
    "pairs": (pairs, r"groups=lambda batch: "),
    "two means": (two_means, r"'first': first.*weights="),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_does_not_add_up_is_an_error_with_what_to_type(name: str) -> None:
    loss_fn, message = WRONG[name]
    with pytest.raises(ga.LossError, match=rf"(?s)does not add up.*8 samples together.*{message}"):
        run(loss_fn)


def test_the_error_comes_again_and_leaves_nothing_behind() -> None:
    model = nn.Linear(FEATURES, CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), SUM, micro_batch_size=8)
    for call in (step, step.backward, step):
        with pytest.raises(ga.MeanError, match=r"ga\.Loss\.sum\(loss\)"):
            call(make_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------- what is a warning
class Standardized(nn.Module):
    """BatchNorm by hand, without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(x)
        return (scores - scores.mean(0)) / scores.std(0)


class Codebook(nn.Module):
    """A buffer that moves in the forward, and is looked up in it."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("centre", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(x)
        self.centre.mul_(0.5).add_(0.5 * scores.detach().flatten(0, -2).mean(0))
        return scores - self.centre


class Injected(nn.Module):
    """A router whose balance is a gradient, added in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(x)
        return _Inject.apply(scores, 0.1 * scores.softmax(-1).square().sum(1).mean())


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, balance: Tensor) -> Tensor:
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), dtype=gradients[0].dtype)


def clamped() -> nn.Module:
    model = nn.Linear(FEATURES, CLASSES)
    model.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return model


def with_spectral_norm() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES))


NOT_EXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm by hand": (Standardized, r"What Standardized \(Standardized\) returns.*ga\.gather\(x\)"),
    "a centre": (Codebook, r"Codebook\.centre \(of Codebook\) changes in every forward.*No option"),
    "an injected gradient": (Injected, r"gradient of head\.\w+, head\.\w+ does not.*injects"),
    "a hook that clamps": (clamped, r"gradient of weight does not.*Hooks on weight"),
    "spectral norm": (with_spectral_norm, r"_u.*change in every forward.*power iteration"),
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_a_layer_or_a_state_that_depends_on_the_cut_is_named(name: str) -> None:
    make, message = NOT_EXACT[name]
    torch.manual_seed(0)
    evidence, caught = run(cross_entropy, make())
    assert [one.category for one in caught] == [ga.GradAccumWarning]
    assert re.search(message, str(caught[0].message)), caught[0].message
    assert evidence.startswith("not exact: ")


def test_a_layer_of_a_network_that_does_not_train_here_is_named() -> None:
    judge = nn.Sequential(nn.Linear(CLASSES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    evidence, caught = run(lambda m, b: F.softplus(-judge(pooled(m, b))).mean())
    assert len(caught) == 1
    assert "judge.1 (BatchNorm1d)" in str(caught[0].message)
    assert evidence == "not exact: judge.1 (BatchNorm1d) sees the micro-batch"
    judge.eval()
    assert run(lambda m, b: F.softplus(-judge(pooled(m, b))).mean()) == ("exact (checked on 5 + 3 samples)", [])


def test_of_batch_norm_is_warned_once_and_the_rest_is_checked() -> None:
    make = lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))  # noqa: E731
    evidence, caught = run(cross_entropy, make())
    assert [one.category for one in caught] == [ga.BatchNormWarning]
    assert evidence == "not exact: 1 BatchNorm layer sees the micro-batch, the rest exact (checked on 5 + 3 samples)"
    assert run(cross_entropy, make(), batch_norm="exact") == ("exact (checked on 5 + 3 samples)", [])
    with pytest.raises(ga.LossError, match=r"ga\.Loss\.sum"):
        run(SUM, make())


# ------------------------------------------------------------------------------------------------ what is no fault
def counting() -> Callable[[Any, Batch], Any]:
    calls = itertools.count()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * (1 + next(calls) // 4)

    return loss_fn


def from_numpy(model: nn.Module, batch: Batch) -> Tensor:
    noise = torch.as_tensor(np.random.standard_normal((len(batch["x"]), CLASSES)))
    return F.cross_entropy(pooled(model, batch) + noise, batch["target"])


def flipped(model: nn.Module, batch: Batch) -> Tensor:
    signs = torch.tensor([[[random.choice((-1.0, 1.0))]] for _ in range(len(batch["x"]))])
    return cross_entropy(model, {**batch, "x": batch["x"] * signs})


class Policy(nn.Module):
    """Each head has a mean of its own over samples, whose counts are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


MLP = lambda *layers: nn.Sequential(nn.Linear(FEATURES, 6), *layers, nn.Linear(6, CLASSES))  # noqa: E731
FINE: dict[str, tuple[Callable[[Any, Batch], Any], Callable[[], nn.Module] | None]] = {
    "a mean over samples": (cross_entropy, None),
    "compiled": (torch.compile(cross_entropy, backend="eager"), None),
    "opaque": (lambda m, b: Opaque.apply(cross_entropy(m, b)), None),
    "a sum that is said to be one": (lambda m, b: ga.Loss.sum(SUM(m, b)), None),
    "tokens that are counted": (lambda m, b: ga.Loss.mean(tokens(m, b), over=(b["labels"] != -100).sum()), None),
    "a factor": (lambda m, b: 0.3 * cross_entropy(m, b), None),
    "a penalty": (lambda m, b: cross_entropy(m, b) + 0.1 * m.weight.square().mean(), None),
    "each sample its own mean": (lambda m, b: m(b["x"]).square().flatten(1).mean(1).mean(), None),
    "dropout": (cross_entropy, lambda: MLP(nn.Dropout(0.5))),
    "dropout of attention": (
        lambda m, b: F.cross_entropy(m(b["x"]).mean(1), b["target"]),
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(FEATURES, 1, 8, batch_first=True), nn.Linear(FEATURES, CLASSES)
        ),
    ),
    "LayerNorm": (cross_entropy, lambda: MLP(nn.LayerNorm(6))),
    "float32": (cross_entropy, lambda: MLP(nn.GELU())),
    "noise from NumPy": (from_numpy, None),
    "signs from Python": (flipped, None),
    "several models": (lambda m, b: sum(F.cross_entropy(one, b["target"] % 2) for one in pooled(m, b)), Policy),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_exact_is_not_blamed(name: str) -> None:
    loss_fn, make = FINE[name]
    torch.manual_seed(0)
    evidence, caught = run(loss_fn, None if make is None else make())
    assert evidence.startswith("exact (checked on 5 + 3 samples)")
    assert not caught


def test_a_loss_that_is_another_one_every_time_is_not_checked() -> None:
    noise = random.SystemRandom()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * (1 + noise.random())

    evidence, caught = run(loss_fn)
    assert evidence.startswith("not checked: the loss of the same samples is another one")
    assert not caught


def test_a_value_that_is_another_one_in_pieces_is_not_called_exact() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        return loss + loss.detach() ** 2

    found, caught = run(loss_fn)
    assert re.fullmatch(r"not checked: the loss of 8 samples together and 4 \+ 4 is .*gradients agree", found)
    assert not caught


def test_a_loss_that_is_zero_but_for_rounding_is_exact() -> None:
    torch.set_default_dtype(torch.float32)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        ratio = (pooled(model, batch) - pooled(model, batch).detach()).exp()
        return (ratio * (1.7 - ratio.detach() * 1.7 + 0.1 * torch.tensor([1.0, -1.0, 3.0, -3.0]))).mean()

    assert run(loss_fn)[0] == "exact (checked on 5 + 3 samples)"


def test_what_bfloat16_cannot_show_is_said() -> None:
    torch.set_default_dtype(torch.float32)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        x = batch["x"].float()
        with torch.autocast("cpu", torch.bfloat16):
            return (F.cross_entropy(model(x.mean(1)), batch["target"]) + 9).log()

    evidence, _ = run(loss_fn)
    assert re.fullmatch(r"exact \(checked on [35] \+ [13] samples\) to within 0.1, in bfloat16", evidence)


def test_autocast_that_no_module_shows_is_no_fault() -> None:
    torch.set_default_dtype(torch.float32)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            one = torch.func.vmap(lambda x, y: F.cross_entropy(model(x[None])[0], y))
            return one(batch["x"].float().mean(1), batch["target"]).mean()

    evidence, caught = run(loss_fn)
    assert evidence.startswith("exact (checked on 5 + 3 samples) to within")
    assert not caught


def test_a_loss_that_counts_its_calls_is_no_fault() -> None:
    assert run(counting()) == ("exact (checked on 5 + 3 samples)", [])


def test_dropout_of_pairs_that_are_told_is_no_fault() -> None:
    split = ga.split_by_samples(groups=lambda batch: torch.arange(len(batch["x"])) % (ROWS // 2))
    model = MLP(nn.Dropout(0.5))
    assert run(pairs, model, split=split) == ("exact (checked on 6 + 2 samples)", [])


# ---------------------------------------------------------------------------------------------- what is not checked
@pytest.mark.parametrize("options", [{}, {"lockstep": True}, {"randomness": "sample"}])
def test_draws_of_a_loss_over_the_batch_are_no_fault(options: dict[str, Any]) -> None:
    def batch_loss(outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(F.dropout(outputs + torch.randn_like(outputs), 0.2), batch["target"])

    body = nn.Sequential(nn.Linear(FEATURES, 6), nn.Dropout(0.3), nn.Linear(6, CLASSES))
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    step = ga.TrainStep(
        body, optimizer, forward=pooled, batch_loss=batch_loss, micro_batch_size=8, **options
    )  # fmt: skip
    assert step(make_batch()).micro_batches == 3
    assert step._accumulation.plan_line.evidence.startswith("exact (checked on 5 + 3 samples)")


def test_what_cannot_be_checked_is_said() -> None:
    def even(model: nn.Module, batch: Batch) -> Tensor:
        assert len(batch["x"]) == ROWS // 3, "odd sizes are not for me"
        return cross_entropy(model, batch)

    assert run(even)[0] == "not checked: pieces of 5 + 3 samples raise AssertionError: odd sizes are not for me"
    assert run(cross_entropy, size=ROWS)[0] == "not checked: one micro-batch, nothing is cut"
    assert run(cross_entropy, check="off")[0] == 'not checked: check="off"'
    with pytest.raises(ga.WindowError, match=r"check='last'.*\"first\".*\"off\""):
        run(cross_entropy, check="last")


def test_an_error_of_the_loss_itself_is_shown_by_training() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(loss_fn)


@pytest.mark.parametrize(
    ("size", "cut"), [(8, "5 + 3"), (7, "4 + 2"), (5, "3 + 1"), (3, "2 + 1"), (2, "1 + 1"), (1, "1 + 1")]
)
def test_no_more_rows_than_a_micro_batch_has(size: int, cut: str) -> None:
    class Largest(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert len(input) <= max(size, 2)
            return super().forward(input)

    assert run(cross_entropy, Largest(FEATURES, CLASSES), size=size) == (f"exact (checked on {cut} samples)", [])


def test_single_samples_that_training_does_not_run_are_not_held_against_it() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * (1 if len(batch["x"]) > 1 else 3)

    assert run(loss_fn, size=4)[0] == "exact (checked on 2 + 2 samples)"
    assert run(loss_fn, size=2)[0] == "exact (checked on 2 + 2 samples)"
    with pytest.raises(ga.LossError, match="does not add up"):
        run(loss_fn, size=1)


def test_out_of_memory_means_fewer_rows() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if len(batch["x"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return cross_entropy(model, batch)

    model = nn.Linear(FEATURES, CLASSES)
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size="auto")
    step(make_batch())
    assert step._accumulation.plan_line.evidence == "exact (checked on 3 + 1 samples)"
