"""What plain means were taken over: which expressions are read off the graph, and when the guard speaks up."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from gradaccum.losses.meaning import SampleMeans, means_in

CLASSES = 7
ANCHOR = torch.zeros(CLASSES, 3)


class Case:
    """One micro-batch of sequences, with logits that have a graph, labels of which some are ignored, and a mask."""

    def __init__(self, samples: int, length: int, ignored: int = 0) -> None:
        torch.manual_seed(samples * 100 + length)
        self.samples = samples
        self.weight = torch.randn(CLASSES, 3, requires_grad=True)
        self.logits = torch.randn(samples, length, 3) @ self.weight.T
        self.flat = self.logits.reshape(-1, CLASSES)
        self.labels = torch.randint(0, CLASSES, (samples * length,))
        self.labels[:ignored] = -100
        self.mask = (self.labels != -100).float()
        self.target = torch.rand(samples, length, CLASSES)
        self.class_weights = torch.arange(1.0, CLASSES + 1)

    @property
    def each(self) -> Tensor:
        """The loss of each token."""
        return F.cross_entropy(self.flat, self.labels, reduction="none")

    @property
    def counted(self) -> int:
        return int(self.mask.sum())


Expression = Callable[[Case], Tensor]

OVER_TARGETS: dict[str, Expression] = {
    "cross_entropy": lambda c: F.cross_entropy(c.flat, c.labels),
    "cross_entropy of (N, C, T)": lambda c: F.cross_entropy(c.logits.transpose(1, 2), c.labels.reshape(c.samples, -1)),
    "nll_loss": lambda c: F.nll_loss(c.flat.log_softmax(-1), c.labels),
    "cross_entropy in autocast": lambda c: F.cross_entropy(c.flat.bfloat16(), c.labels).float(),
    "(losses * mask).sum() / mask.sum()": lambda c: (c.each * c.mask).sum() / c.mask.sum(),
    "... with a clamp": lambda c: (c.each * c.mask).sum() / c.mask.sum().clamp(min=1),
    "... with an epsilon": lambda c: (c.each * c.mask).sum() / (c.mask.sum() + 1e-8),
    "-(log_p * mask).sum() / mask.sum()": lambda c: -(-c.each * c.mask).sum() / c.mask.sum(),
    "cross_entropy(sum) / count": lambda c: F.cross_entropy(c.flat, c.labels, reduction="sum") / c.mask.sum(),
    "losses[mask].mean()": lambda c: c.each[c.mask.bool()].mean(),
    "losses @ mask / mask.sum()": lambda c: c.each @ c.mask / c.mask.sum(),
    "sum(dim) / count": lambda c: (c.each * c.mask).sum(0) / c.mask.sum(),
    "times a factor": lambda c: 0.1 * F.cross_entropy(c.flat, c.labels) * 3 / 7,
    "an element of a stack": lambda c: torch.stack([F.cross_entropy(c.flat, c.labels)])[0].clone(),
    "within a checkpoint": lambda c: checkpoint(F.cross_entropy, c.flat, c.labels, use_reentrant=False),  # type: ignore[return-value]
}

OVER_ELEMENTS: dict[str, Expression] = {
    "mse_loss": lambda c: F.mse_loss(c.logits, c.target),
    "l1_loss": lambda c: F.l1_loss(c.logits, c.target),
    "smooth_l1_loss": lambda c: F.smooth_l1_loss(c.logits, c.target),
    "huber_loss": lambda c: F.huber_loss(c.logits, c.target),
    "binary_cross_entropy": lambda c: F.binary_cross_entropy(c.logits.sigmoid(), c.target),
    "... with logits": lambda c: F.binary_cross_entropy_with_logits(c.logits, c.target),
    "... and weights": lambda c: F.binary_cross_entropy_with_logits(
        c.logits, c.target, weight=c.class_weights, pos_weight=c.class_weights
    ),
    "soft_margin_loss": lambda c: F.soft_margin_loss(c.logits, c.target.sign()),
    "mean()": lambda c: (c.logits - c.target).pow(2).mean(),
    "mean() in bf16": lambda c: (c.logits - c.target).bfloat16().pow(2).mean().float(),
    "mean over all dimensions": lambda c: (c.logits - c.target).pow(2).mean(dim=(0, 1, 2)),
    "mean over the only dimension": lambda c: c.logits.flatten().pow(2).mean(0),
    "sum() / numel()": lambda c: (c.logits - c.target).pow(2).sum() / c.logits.numel(),
    "mse_loss(sum) / numel()": lambda c: F.mse_loss(c.logits, c.target, reduction="sum") / c.logits.numel(),
    "plus a penalty": lambda c: F.mse_loss(c.logits, c.target) + 0.1 * c.weight.pow(2).sum(),
    "subtracted and negated": lambda c: F.mse_loss(c.logits, c.target).neg() - 1,
    "reshaped": lambda c: F.mse_loss(c.logits, c.target).reshape(1).squeeze(),
}


ALL = {**OVER_TARGETS, **OVER_ELEMENTS}
assert len(ALL) == len(OVER_TARGETS) + len(OVER_ELEMENTS)


def batchmean(case: Case) -> Tensor:
    log_shares = case.flat.log_softmax(-1).reshape(case.samples, -1)
    return F.kl_div(log_shares, case.target.flatten(1), reduction="batchmean")


def counts(loss: Tensor) -> list[float]:
    return [float(mean.count) for mean in means_in(loss)]


@pytest.mark.parametrize("expression", OVER_TARGETS.values(), ids=OVER_TARGETS)
def test_a_mean_over_targets_is_recognised(expression: Expression) -> None:
    case = Case(4, 6, ignored=5)
    assert case.counted == 19
    assert 19 in counts(expression(case))


@pytest.mark.parametrize("expression", OVER_ELEMENTS.values(), ids=OVER_ELEMENTS)
def test_a_mean_over_elements_is_recognised(expression: Expression) -> None:
    assert 4 * 6 * CLASSES in counts(expression(Case(4, 6)))


def test_a_mean_that_is_subtracted_is_recognised() -> None:
    """One minus a mean score: cosine, Dice, intersection over union."""
    case = Case(4, 6, ignored=5)
    assert counts(1 - (case.each * case.mask).sum() / case.mask.sum()) == [19]


def test_class_weights_are_summed_up() -> None:
    case = Case(4, 6, ignored=5)
    [mean] = means_in(F.cross_entropy(case.flat, case.labels, weight=case.class_weights))
    kept = case.labels[case.labels != -100]
    assert float(mean.count) == case.class_weights[kept].sum()
    assert mean.what == "the sum of class weights"


def test_label_smoothing_and_both_terms_of_a_sum() -> None:
    case = Case(4, 6, ignored=5)
    assert set(counts(F.cross_entropy(case.flat, case.labels, label_smoothing=0.1))) == {19}
    both = counts(F.cross_entropy(case.flat, case.labels) + 0.5 * F.mse_loss(case.logits, case.target))
    assert sorted(both) == [19, 168]


OVER_SAMPLES: dict[str, Expression] = {
    "sums of samples": lambda c: (c.each.reshape(c.samples, -1).sum(1)).mean(),
    "means of samples": lambda c: c.each.reshape(c.samples, -1).mean(1).mean(),
    "divided by the samples": lambda c: c.each.sum() / c.samples,
    "batchmean": batchmean,
}
OVER_NOTHING: dict[str, Expression] = {
    "a parameter": lambda c: torch.ones((), requires_grad=True),
    "a sum": lambda c: c.flat.sum(),
    "a norm": lambda c: c.flat.norm(),
    "sum": lambda c: F.cross_entropy(c.flat, c.labels, reduction="sum"),
    "a mean over some dimensions": lambda c: c.flat.mean(0).sum(),
}


@pytest.mark.parametrize("name", [*OVER_SAMPLES, *OVER_NOTHING])
def test_means_over_samples_are_recognised_and_no_others_made_up(name: str) -> None:
    assert counts((OVER_SAMPLES | OVER_NOTHING)[name](Case(4, 6))) == ([4] if name in OVER_SAMPLES else [])


def test_the_graph_can_still_run_backward() -> None:
    for expression in ALL.values():
        case = Case(4, 6, ignored=5)
        loss = expression(case)
        means_in(loss)
        loss.backward()
        assert case.weight.grad is not None


def test_a_freed_graph_is_no_error() -> None:
    loss = F.mse_loss(Case(4, 6).logits, torch.zeros(4, 6, CLASSES))
    loss.backward()
    assert counts(loss) == []


def test_the_walk_is_short() -> None:
    """Of a loss with very many terms, what is far from the root is not looked at: that would cost a forward's time."""
    near, far = torch.ones(3, requires_grad=True).mean(), torch.ones(5, requires_grad=True).mean()
    for _ in range(1000):
        far = far + 0
    assert counts(near + far) == [3]


# ------------------------------------------------------------------------------------------------------------ the guard
def check(expression: Expression, cases: Sequence[Case], guard: SampleMeans | None = None) -> None:
    guard = SampleMeans() if guard is None else guard
    for case in cases:
        guard.check("", expression(case), case.samples)
    guard.window_closed()


@pytest.mark.parametrize("expression", OVER_TARGETS.values(), ids=OVER_TARGETS)
def test_ignored_targets_are_an_error(expression: Expression) -> None:
    with pytest.raises(ga.MeanError, match=r"averaged over .*: 24, 19 in micro-batches of 4, 4 samples"):
        check(expression, [Case(4, 6), Case(4, 6, ignored=5)])


@pytest.mark.parametrize("expression", ALL.values(), ids=ALL)
def test_padding_to_another_length_is_an_error(expression: Expression) -> None:
    with pytest.raises(ga.MeanError, match=r"averaged over .* in micro-batches of 4, 4 samples"):
        check(expression, [Case(4, 6), Case(4, 8)])


@pytest.mark.parametrize("expression", ALL.values(), ids=ALL)
def test_samples_of_equal_length_pass(expression: Expression) -> None:
    check(expression, [Case(4, 6), Case(4, 6), Case(3, 6), Case(1, 6)])


def weighted(case: Case) -> Tensor:
    return F.cross_entropy(case.flat, case.labels, weight=case.class_weights)


def composite(case: Case) -> Tensor:
    return case.logits.pow(2).reshape(case.samples, -1).mean(1).mean() + 0.1 * F.cross_entropy(case.flat, case.labels)


WRONG: dict[str, tuple[Expression, list[Case], str]] = {
    "class weights": (
        weighted,
        [Case(4, 6), Case(4, 6, ignored=9)],
        r"the sum of class weights: .* Return the loss .*ga\.criterion",
    ),
    "one bad term of several": (
        composite,
        [Case(4, 6), Case(4, 6, ignored=7)],
        "targets that are not ignored: 24, 17",
    ),
    "a fixed batch size as divisor": (
        lambda c: c.each.sum() / 4,
        [Case(4, 6), Case(3, 6)],
        "4, 4 in micro-batches of 4, 3 samples",
    ),
    "all targets ignored": (OVER_TARGETS["cross_entropy"], [Case(4, 6), Case(4, 6, ignored=24)], "24, 0"),
    "all ignored at first": (OVER_TARGETS["cross_entropy"], [Case(4, 6, ignored=24), Case(4, 6)], "0, 24"),
}


@pytest.mark.parametrize(("expression", "cases", "message"), WRONG.values(), ids=WRONG)
def test_means_over_something_else_are_an_error(expression: Expression, cases: list[Case], message: str) -> None:
    with pytest.raises(ga.MeanError, match=message):
        check(expression, cases)


PENALTIES: dict[str, Expression] = {
    "mean of the weights": lambda c: c.weight.pow(2).mean(),
    "a constant divisor": lambda c: c.weight.pow(2).sum() / 8,
    "mean over dimensions": lambda c: 0.1 * c.weight.abs().mean(dim=(0, 1)),
    "norm": lambda c: c.weight.norm(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(
    "main", [lambda c: c.logits.pow(2).mean(), lambda c: c.each.sum() / c.samples], ids=["mean", "sum"]
)
def test_penalties_on_weights_pass(main: Expression, penalty: Expression) -> None:
    check(lambda case: main(case) + penalty(case), [Case(4, 6), Case(4, 6), Case(3, 6)])


# 2, by which two terms are divided, is also the number of samples of some of the micro-batches.
RIGHT: dict[str, tuple[Expression, list[Case]]] = {
    "equal class weights": (
        lambda c: F.cross_entropy(c.flat, c.labels, weight=torch.full((CLASSES,), 0.1)),
        [Case(4, 6), Case(3, 6)],
    ),
    "means of samples of any length": (OVER_SAMPLES["means of samples"], [Case(4, 6), Case(4, 8), Case(2, 3)]),
    "a mean over samples and one over as many targets": (composite, [Case(4, 6), Case(3, 6)]),
    "two terms / 2": (lambda c: (c.each.mean() + c.logits.pow(2).mean()) / 2, [Case(2, 6), Case(2, 6), Case(1, 6)]),
    "mean of two terms": (
        lambda c: torch.stack([c.each.mean(), c.logits.pow(2).mean()]).mean(),
        [Case(2, 6), Case(2, 6), Case(1, 6)],
    ),
}


@pytest.mark.parametrize(("expression", "cases"), RIGHT.values(), ids=RIGHT)
def test_means_over_samples_pass(expression: Expression, cases: list[Case]) -> None:
    check(expression, cases)


def test_the_message_has_counts_factor_and_remedy() -> None:
    guard = SampleMeans()
    for case in (Case(4, 6), Case(4, 6)):
        guard.check("lm", OVER_TARGETS["cross_entropy"](case), case.samples)
    with pytest.raises(ga.MeanError) as raised:
        guard.check("lm", OVER_TARGETS["cross_entropy"](Case(4, 6, ignored=16)), 4)
    message = str(raised.value)
    assert message.startswith("The term 'lm' is a plain tensor and so is taken as a mean over samples")
    assert "24, 24, 8 in micro-batches of 4, 4, 4 samples" in message
    assert "2.33 times" in message, "8 of 56 tokens would count as 4 of 12 samples"
    assert "ga.criterion(nn.CrossEntropyLoss(...))" in message


def test_terms_are_compared_with_themselves() -> None:
    guard = SampleMeans()
    for case in (Case(4, 6), Case(3, 6)):
        guard.check("a", case.each.mean(), case.samples)
        guard.check("b", case.logits.mean(), case.samples)


def test_micro_batches_of_no_samples_are_left_out() -> None:
    guard = SampleMeans()
    guard.check("", Case(4, 6).each.mean(), 4)
    guard.check("", torch.zeros(0, requires_grad=True).mean(), 0)
    guard.check("", Case(3, 6).each.mean(), 3)


# --------------------------------------------------------------------------------------------- one window after another
def test_counts_of_the_data_are_looked_at_in_later_windows_too() -> None:
    guard = SampleMeans()
    expression = OVER_TARGETS["cross_entropy"]
    for _ in range(3):
        check(expression, [Case(4, 6), Case(3, 6)], guard)
        assert guard.is_looking
    with pytest.raises(ga.MeanError, match="24, 20"):
        check(expression, [Case(4, 6), Case(4, 6, ignored=4)], guard)


@pytest.mark.parametrize("expression", OVER_ELEMENTS.values(), ids=OVER_ELEMENTS)
def test_shapes_are_looked_at_in_later_windows_too(expression: Expression) -> None:
    guard = SampleMeans()
    check(expression, [Case(4, 6), Case(3, 6)], guard)
    check(expression, [Case(4, 8), Case(3, 8)], guard)
    with pytest.raises(ga.MeanError, match=r"averaged over .* in micro-batches of 4, 3 samples"):
        check(expression, [Case(4, 6), Case(3, 8)], guard)


def test_a_window_of_one_micro_batch_tells_nothing() -> None:
    guard = SampleMeans()
    for _ in range(3):
        check(OVER_ELEMENTS["mse_loss"], [Case(4, 6)], guard)
        assert guard.is_looking
    with pytest.raises(ga.MeanError, match="168, 224"):
        check(OVER_ELEMENTS["mse_loss"], [Case(4, 6), Case(4, 8)], guard)


def test_windows_are_not_compared_with_each_other() -> None:
    guard = SampleMeans()
    for length in (6, 8, 3):
        check(OVER_TARGETS["cross_entropy"], [Case(4, length), Case(3, length)], guard)


# ---------------------------------------------------------------------------------------------------- in both pipelines
def test_two_batches_of_different_length_are_each_exact() -> None:
    model = nn.Linear(3, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda model, x: model(x).pow(2).mean(), micro_batch_size=2)
    for length in (6, 8, 6):
        step.backward(torch.randn(5, length, 3))
        optimizer.zero_grad()
        step(torch.randn(5, length, 3))


def test_a_window_that_was_discarded_counts_for_nothing() -> None:
    model = nn.Linear(3, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2)
    loader = [torch.randn(2, 6, 3), torch.randn(2, 8, 3)]

    def train(loss_of: Callable[[Tensor], Any]) -> None:
        for x in accumulator.over(loader):
            accumulator.backward(loss_of(model(x).pow(2)))

    with pytest.raises(ga.MeanError, match="84, 112 in micro-batches of 2, 2 samples"):
        train(lambda losses: losses.mean())
    train(lambda losses: losses.mean((1, 2)).mean())
    train(lambda losses: ga.Loss.sum(losses.sum(), over=losses.numel()))
    assert accumulator.updates == 2


class LikeHuggingFace(nn.Embedding):
    """Shifts the labels and takes the mean over those that are not ignored, as their causal models do."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input_ids)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def test_what_a_hugging_face_model_returns_with_its_labels() -> None:
    model = LikeHuggingFace(CLASSES, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda model, batch: model(**batch)["loss"], micro_batch_size=2)
    ids = torch.randint(0, CLASSES, (4, 8))
    assert step({"input_ids": ids, "labels": ids}).samples == 4
    labels = ids.masked_fill(torch.arange(4)[:, None] + torch.arange(8) > 8, -100)
    with pytest.raises(ga.MeanError, match=r"targets that are not ignored: 14, 11 in micro-batches of 2, 2 samples"):
        step({"input_ids": ids, "labels": labels})


def test_the_evidence_in_words() -> None:
    guard, case = SampleMeans(), Case(4, 6)
    assert guard.evidence() == ""
    guard.check("", case.each.mean(), 4)
    assert guard.evidence() == "read: a mean over samples"
    guard.window_discarded()
    guard.check("", case.flat.norm(), 4)
    assert guard.evidence() == "not checked: what the mean is over cannot be seen"
