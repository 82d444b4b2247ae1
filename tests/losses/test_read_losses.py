"""A table of losses in one's own loop: exact ones are accepted in silence, wrong ones are told before an update."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga

CLASSES, LENGTH, FEATURES = 5, 6, 3
Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels of which some are ignored, targets
LossFn = Callable[[nn.Linear, Batch], Any]


class Fused(torch.autograd.Function):
    """The shape of fused losses: what was divided by cannot be seen from outside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = F.cross_entropy(leaf, labels)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.saved_tensors[0] * gradients[0], None


def batch_of(sizes: tuple[int, ...], *, ignores: bool) -> list[Batch]:
    torch.manual_seed(3)
    batches = []
    for i, n in enumerate(sizes):
        labels = torch.randint(0, CLASSES, (n, LENGTH))
        if ignores:
            labels[:, : i + 1] = -100
        batches.append((torch.randn(n, LENGTH, FEATURES).double(), labels, torch.randn(n, LENGTH, CLASSES).double()))
    return batches


def model_of() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES).double()


def flat(m: nn.Linear, b: Batch) -> tuple[Tensor, Tensor]:
    return m(b[0]).flatten(0, 1), b[1].flatten()


def ce(m: nn.Linear, b: Batch, **options: Any) -> Tensor:
    return F.cross_entropy(*flat(m, b), **options)


def each(m: nn.Linear, b: Batch) -> Tensor:
    return ce(m, b, reduction="none").reshape(len(b[0]), -1)


def mask(b: Batch) -> Tensor:
    return (b[1] != -100).double()


def mse(m: nn.Linear, b: Batch, **options: Any) -> Tensor:
    return F.mse_loss(m(b[0]), b[2], **options)


def per_image(m: nn.Linear, b: Batch) -> list[Tensor]:
    """RetinaNet: the sum of each image is divided by its own count."""
    return [
        F.cross_entropy(m(x)[: k + 1], y[: k + 1], reduction="sum") / (k + 1)
        for k, (x, y) in enumerate(zip(b[0], b[1], strict=True))
    ]


UNEQUAL, EQUAL = (4, 3, 2), (4, 4, 4)

# Exact: nothing is said, and the gradient is the whole batch's. No labels are ignored.
EXACT: dict[str, LossFn] = {
    "cross_entropy": ce,
    "mse_loss": mse,
    "l1_loss": lambda m, b: F.l1_loss(m(b[0]), b[2]),
    "smooth_l1_loss": lambda m, b: F.smooth_l1_loss(m(b[0]), b[2]),
    "huber_loss": lambda m, b: F.huber_loss(m(b[0]), b[2]),
    "bce with logits": lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[2].sigmoid()),
    "soft_margin": lambda m, b: F.soft_margin_loss(m(b[0]), b[2].sign()),
    "kl_div batchmean": lambda m, b: F.kl_div(m(b[0]).log_softmax(-1), b[2].softmax(-1), reduction="batchmean"),
    "multi_margin": lambda m, b: F.multi_margin_loss(*flat(m, b)),
    "poisson": lambda m, b: F.poisson_nll_loss(m(b[0]), b[2].abs()),
    "probabilities": lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[2].softmax(-1).flatten(0, 1)),
    "label smoothing": lambda m, b: ce(m, b, label_smoothing=0.1),
    "mean / 2": lambda m, b: mse(m, b) / 2,
    "0.5 * mean": lambda m, b: 0.5 * mse(m, b),
    "(a + b) / 2": lambda m, b: (mse(m, b) + ce(m, b)) / 2,
    "mean of a stack of terms": lambda m, b: torch.stack([mse(m, b), ce(m, b)]).mean(),
    "sum / numel": lambda m, b: (m(b[0]) - b[2]).square().sum() / b[2].numel(),
    "sum / samples": lambda m, b: mse(m, b, reduction="sum") / len(b[0]),
    "sum * (1 / samples)": lambda m, b: mse(m, b, reduction="sum") * (1 / len(b[0])),
    "sum / ln 2 / samples": lambda m, b: each(m, b).sum() / 0.693 / len(b[0]),
    "(sum over tokens).mean()": lambda m, b: each(m, b).sum(1).mean(),
    "mean of means": lambda m, b: each(m, b).mean(1).mean(),
    "mean(0).sum()": lambda m, b: (m(b[0]) - b[2]).square().mean(0).sum(),
    "python sum of samples / samples": lambda m, b: sum(x.mean() for x in each(m, b)) / len(b[0]),
    "RetinaNet": lambda m, b: sum(per_image(m, b)) / len(b[0]),
    "RetinaNet, stacked": lambda m, b: torch.stack(per_image(m, b)).mean(),
    "a mean over as many as a micro-batch has": lambda m, b: ce(m, b) + 0.01 * m.bias[:4].square().mean(),
    "penalty, a mean": lambda m, b: ce(m, b) + 0.01 * m.weight.square().mean(),
    "penalty, a sum": lambda m, b: ce(m, b) + 0.01 * m.weight.square().sum(),
    "penalty, a norm": lambda m, b: ce(m, b) + 0.01 * m.weight.norm(),
    "penalty, of a product": lambda m, b: ce(m, b) + 0.01 * (m.weight @ m.weight.T - torch.eye(5)).square().sum(),
    "penalty, a sum / 4": lambda m, b: ce(m, b) + m.weight.square().sum() / 4,
    "learned weight": lambda m, b: ce(m, b) * torch.exp(-m.bias[0]) + m.bias[0],
    "nan_to_num": lambda m, b: ce(m, b).nan_to_num(),
    "where": lambda m, b: (lambda loss: torch.where(loss.isfinite(), loss, 0.0))(ce(m, b)),
    "clamp that lets it through": lambda m, b: ce(m, b).clamp(max=1000.0),
    "ga.criterion": lambda m, b: ga.criterion(nn.CrossEntropyLoss())(*flat(m, b)),
    "ga.Loss.mean": lambda m, b: ga.Loss.mean(mse(m, b), over=len(b[0])),
    "ga.Loss.sum": lambda m, b: ga.Loss.sum(mse(m, b, reduction="sum"), over=b[2].numel()),
    "ga.weight_of": lambda m, b: ga.weight_of(ce(m, b)),
}
# The same with labels that are ignored.
EXACT_IGNORED: dict[str, LossFn] = {
    "ga.criterion": lambda m, b: ga.criterion(nn.CrossEntropyLoss())(*flat(m, b)),
    "ga.weight_of": lambda m, b: ga.weight_of(ce(m, b)),
    "ga.weight_of a quotient": lambda m, b: ga.weight_of((each(m, b) * mask(b)).sum() / mask(b).sum()),
    "ga.Loss.mean": lambda m, b: ga.Loss.mean(ce(m, b), over=mask(b).sum()),
    "ga.Loss.sum": lambda m, b: ga.Loss.sum((each(m, b) * mask(b)).sum(), over=mask(b).sum()),
    "each sample over its own count": lambda m, b: ((each(m, b) * mask(b)).sum(1) / mask(b).sum(1)).mean(),
}
SUM = r"graph ends in a sum.*ga\.Loss\.sum\(loss\)"
OVER = r"averaged over .* in micro-batches of .* samples.*Return the loss"
DECLARED = r"declared as a mean over .* but its graph says that it was averaged over"
# Wrong: an error before an update; losses, and whether labels are ignored.
WRONG: dict[str, tuple[LossFn, bool, str]] = {
    "nll, sum": (lambda m, b: ce(m, b, reduction="sum"), False, SUM),
    "mse, sum": (lambda m, b: mse(m, b, reduction="sum"), False, SUM),
    "0.5 * sum": (lambda m, b: 0.5 * (m(b[0]) - b[2]).square().sum(), False, SUM),
    "sum of token losses": (lambda m, b: (each(m, b) * mask(b)).sum(), True, SUM),
    "sum of per-sample terms": (lambda m, b: sum(x[: k + 1].mean() for k, x in enumerate(each(m, b))), False, SUM),
    "VAE, two sums": (lambda m, b: mse(m, b, reduction="sum") + 0.1 * m(b[0]).square().sum(), False, SUM),
    "mean + a sum over the batch": (lambda m, b: mse(m, b) + 0.1 * m(b[0]).square().sum(), False, SUM),
    "ga.Loss.mean of a sum": (lambda m, b: ga.Loss.mean(mse(m, b, reduction="sum"), over=len(b[0])), False, SUM),
    "ga.Loss.sum of a mean": (lambda m, b: ga.Loss.sum(mse(m, b), over=len(b[0])), False, "is a mean already"),
    "ignored labels": (ce, True, OVER),
    "nll.sum() / n": (lambda m, b: (each(m, b) * mask(b)).sum() / mask(b).sum(), True, OVER),
    "(nll / ln 2).sum() / n": (lambda m, b: (each(m, b) * mask(b) / 0.693).sum() / mask(b).sum(), True, OVER),
    "(nll.sum() / 2) / n": (lambda m, b: (each(m, b) * mask(b)).sum() / 2 / mask(b).sum(), True, OVER),
    "nll.sum() * (1 / n)": (lambda m, b: (each(m, b) * mask(b)).sum() * (1 / mask(b).sum()), True, OVER),
    "(nll / n).sum()": (lambda m, b: (each(m, b) * mask(b) / mask(b).sum()).sum(), True, OVER),
    "nll[mask].mean()": (lambda m, b: each(m, b)[mask(b).bool()].mean(), True, OVER),
    "nan_to_num": (lambda m, b: ce(m, b).nan_to_num(), True, OVER),
    "where": (lambda m, b: (lambda loss: torch.where(loss.isfinite(), loss, 0.0))(ce(m, b)), True, OVER),
    "clamp": (lambda m, b: ce(m, b).clamp(max=1000.0), True, OVER),
    "learned weight": (lambda m, b: ce(m, b) * torch.exp(-m.bias[0]) + m.bias[0], True, OVER),
    "two terms / 2": (lambda m, b: (ce(m, b) + mse(m, b)) / 2, True, OVER),
    "over=len": (lambda m, b: ga.Loss.mean(ce(m, b), over=len(b[0])), True, DECLARED),
    "over=numel": (lambda m, b: ga.Loss.mean(ce(m, b), over=b[1].numel()), True, DECLARED),
    "over=labels, shifted": (
        lambda m, b: ga.Loss.mean(
            F.cross_entropy(m(b[0])[:, :-1].transpose(1, 2), b[1][:, 1:]), over=(b[1] != -100).sum() - len(b[1]) // 2
        ),
        True,
        DECLARED,
    ),
    "two means, declared over one": (
        lambda m, b: ga.Loss.mean(ce(m, b) + 0.1 * m(b[0]).logsumexp(-1).square().mean(), over=mask(b).sum()),
        True,
        DECLARED + ".*weights=",
    ),
}
UNSEEN: dict[str, LossFn] = {
    "autograd.Function": lambda m, b: Fused.apply(*flat(m, b)),
    "RMSE": lambda m, b: mse(m, b).sqrt(),
    "norm": lambda m, b: (m(b[0]) - b[2]).norm(),
    "a clamp that is active": lambda m, b: mse(m, b).clamp(max=1e-3) + 0 * m(b[0]).norm(),
    "Dice": lambda m, b: 1 - 2 * (m(b[0]) * b[2]).sum() / m(b[0]).square().sum(),
}


def train(accumulator: ga.Accumulator, batches: list[Batch], loss_of: Callable[[int, Batch], Any]) -> None:
    for i, batch in enumerate(accumulator.over(batches)):
        accumulator.backward(loss_of(i, batch))


def gradient_of(loss_fn: LossFn, batches: list[Batch]) -> Tensor:
    """The accumulated gradient, in float64, as plain SGD with a step of 1 applies it."""
    model = model_of()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), micro_batches=len(batches))
    for batch in accumulator.over(batches):
        accumulator.backward(loss_fn(model, batch))
    assert accumulator.updates == 1
    return before - nn.utils.parameters_to_vector(model.parameters()).detach()


def whole_gradient(loss_fn: LossFn, batches: list[Batch]) -> Tensor:
    model = model_of()
    whole = loss_fn(model, tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))  # type: ignore[arg-type]
    value = whole.value if isinstance(whole, ga.Loss) else whole
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize("sizes", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_losses_are_accepted_in_silence(name: str, sizes: tuple[int, ...]) -> None:
    batches = batch_of(sizes, ignores=False)
    got = gradient_of(EXACT[name], batches)
    if "RetinaNet" not in name:  # whose images' counts here depend on their place
        torch.testing.assert_close(got, whole_gradient(EXACT[name], batches), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", EXACT_IGNORED)
def test_exact_losses_of_ignored_labels(name: str) -> None:
    batches = batch_of(UNEQUAL, ignores=True)
    got = gradient_of(EXACT_IGNORED[name], batches)
    torch.testing.assert_close(got, whole_gradient(EXACT_IGNORED[name], batches), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sizes", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize(("loss_fn", "ignores", "match"), WRONG.values(), ids=WRONG)
def test_wrong_losses_are_told_before_an_update(
    loss_fn: LossFn, ignores: bool, match: str, sizes: tuple[int, ...]
) -> None:
    with pytest.raises(ga.MeanError, match=match):
        gradient_of(loss_fn, batch_of(sizes, ignores=ignores))


@pytest.mark.parametrize("sizes", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
def test_a_sum_divided_by_the_windows_total(sizes: tuple[int, ...]) -> None:
    """What transformers' trainers and verl do: num_items_in_batch is counted over the whole window."""
    batches = batch_of(sizes, ignores=True)
    total = sum(int(mask(batch).sum()) for batch in batches)
    for divisor in (total, torch.tensor(total)):
        with pytest.raises(ga.MeanError, match=rf"divided by {total}.*ga\.Loss\.sum\(loss\)|{OVER}"):
            gradient_of(lambda m, b, n=divisor: ce(m, b, reduction="sum") / n, batches)
    got = gradient_of(lambda m, b: ga.Loss.sum(ce(m, b, reduction="sum") / total), batches)
    torch.testing.assert_close(got, whole_gradient(ce, batches), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_read_is_said_once(name: str) -> None:
    model = model_of()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in accumulator.over(batch_of((3, 3, 3, 3), ignores=False)):
            accumulator.backward(UNSEEN[name](model, batch))
    [warning] = caught
    assert issubclass(warning.category, ga.GradAccumWarning)
    assert "What this mean is over cannot be seen" in str(warning.message)
    assert "ga.Loss.mean(loss, over=...)" in str(warning.message)
    assert "ga.audit" in str(warning.message)
    assert warning.filename == __file__


def test_a_compiled_loss_is_said_to_be_unseen() -> None:
    model = model_of()
    loss_fn = torch.compile(ce, backend="aot_eager")
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    with pytest.warns(ga.GradAccumWarning, match="cannot be seen: the loss's graph ends in CompiledFunction"):
        train(accumulator, batch_of((3, 3), ignores=False), lambda _, batch: loss_fn(model, batch))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, b: mse(m, b) / 3,
        lambda m, b: mse(m, b) * (1 / 3),
        lambda m, b: (mse(m, b) + 0.1 * ce(m, b)) / 3,
        lambda m, b: mse(m, b, reduction="sum") / len(b[0]) / 3,
        lambda m, b: ga.criterion(nn.MSELoss())(m(b[0]), b[2]) / 3,
    ],
)
def test_a_left_over_division_by_the_number_of_micro_batches(loss_fn: LossFn) -> None:
    with pytest.warns(ga.GradAccumWarning, match=r"divided by 3, and the window has 3 .*test_read_losses\.py:\d+"):
        gradient_of(loss_fn, batch_of((2, 2, 2), ignores=False))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, b: mse(m, b) / 4,
        lambda m, b: (mse(m, b) + ce(m, b) + each(m, b).square().mean()) / 3,
        lambda m, b: mse(m, b) / torch.tensor(3.0),
        lambda m, b: mse(m, b, reduction="sum") / len(b[0]),
    ],
)
def test_other_divisions_are_factors(loss_fn: LossFn) -> None:
    gradient_of(loss_fn, batch_of((3, 3, 3), ignores=False))


def test_a_mask_in_a_later_window() -> None:
    """A first window that was fully labelled says nothing about the next one."""
    model = model_of()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    full, masked = batch_of((3, 3), ignores=False), batch_of((3, 3), ignores=True)
    with pytest.raises(ga.MeanError, match=r"averaged over elements: 15, 12 in micro-batches of 3, 3 samples"):
        train(accumulator, [*full, *full, *masked], lambda _, b: each(model, b)[mask(b).bool()].mean())
    assert accumulator.updates == 2


def test_a_declared_count_in_a_later_window() -> None:
    model = model_of()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    full, masked = batch_of((3, 3), ignores=False), batch_of((3, 3), ignores=True)
    with pytest.raises(ga.MeanError, match=DECLARED):
        train(accumulator, [*full, *masked], lambda _, b: ga.Loss.mean(ce(model, b), over=b[1].numel()))
    assert accumulator.updates == 1


def test_a_term_that_is_switched_on_later_is_read_anew() -> None:
    model = model_of()
    accumulator = ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches=2)
    full, masked = batch_of((3, 3), ignores=False), batch_of((3, 3), ignores=True)
    with pytest.raises(ga.MeanError, match=OVER):
        train(
            accumulator,
            [*full, *full, *masked],
            lambda i, b: mse(model, b) if i < 2 else mse(model, b) + 0.1 * ce(model, b),
        )


# ---------------------------------------------------------------------------------------------------------- weight_of
def test_weight_of_reads_the_count() -> None:
    model, [batch] = model_of(), batch_of((4,), ignores=True)
    weights = torch.arange(1.0, CLASSES + 1).double()
    kept = batch[1][batch[1] != -100]
    for loss, count in (
        (ce(model, batch), len(kept)),
        (0.1 * ce(model, batch), len(kept)),
        (ce(model, batch, weight=weights), float(weights[kept].sum())),
        (mse(model, batch), 4 * LENGTH * CLASSES),
        (each(model, batch).sum(1).mean(), 4),
        (ce(model, batch).nan_to_num() + model.weight.norm(), len(kept)),  # type: ignore[operator]
    ):
        read = ga.weight_of(loss)
        assert read.is_mean
        assert read.root is loss
        assert float(read.weight) == pytest.approx(count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss_of", "match"),
    [
        (lambda m, b: ce(m, b, reduction="sum"), r"given a sum.*ga\.Loss\.sum\(loss\)"),
        (lambda m, b: m(b[0]).square().sum(), r"given a sum.*ga\.Loss\.sum\(loss\)"),
        (lambda m, b: mse(m, b).sqrt(), r"cannot be seen.*Sqrt.*ga\.Loss\.mean\(loss, over=n\)"),
        (lambda m, b: Fused.apply(*flat(m, b)), r"cannot be seen.*Fused.*ga\.Loss\.mean\(loss, over=n\)"),
        (lambda m, b: ce(m, b) + mse(m, b), r"different things, 20 .* and 120 .*weights="),
        (lambda m, b: ce(m, b).detach(), "0-d tensor with a graph"),
        (lambda m, b: each(m, b), "0-d tensor with a graph"),
        (lambda m, b: 1.0, "0-d tensor with a graph"),
    ],
)
def test_weight_of_says_what_it_cannot_see(loss_of: LossFn, match: str) -> None:
    with pytest.raises(ga.LossError, match=match):
        ga.weight_of(loss_of(model_of(), batch_of((4,), ignores=True)[0]))
