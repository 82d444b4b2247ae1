"""One window: opened, added to, closed or discarded; whatever goes wrong, the next one starts clean."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

import gradaccum as ga
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.options import Options
from gradaccum.window.weights import add_weights, weights_by_name

FP64 = 1e-12


def made(**options: Any) -> tuple[nn.Linear, Accumulation]:
    model = nn.Linear(3, 1, dtype=torch.float64)
    return model, Accumulation(model, SGD(model.parameters(), lr=0.1), Options(**options))


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).flatten()


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return losses(model, x).mean()


def data(*rows: int) -> list[Tensor]:
    return [torch.randn(n, 3, dtype=torch.float64) for n in rows]


def run(accumulation: Accumulation, model: nn.Module, batches: list[Tensor], **known: Any) -> None:
    """Opens a window, and adds what the model makes of each micro-batch."""
    accumulation.open(**known)
    for x in batches:
        accumulation.add(mean(model, x), samples=len(x))


def clean(model: nn.Module, accumulation: Accumulation) -> bool:
    return (
        all(parameter.grad is None for parameter in model.parameters())
        and not accumulation.is_open
        and accumulation.open_micro_batches == accumulation.open_samples == 0
    )


# ----------------------------------------------------------------------------------------------------------- one window
def test_counters_and_the_window_so_far() -> None:
    model, accumulation = made()
    for index in (1, 2):
        run(accumulation, model, data(4, 2))
        assert accumulation.is_open
        assert (accumulation.open_micro_batches, accumulation.open_samples) == (2, 6)
        assert accumulation.close().index == index
    counts = accumulation.counts
    assert (counts.updates, counts.micro_batches, counts.samples) == (2, 4, 12)


def test_rows_that_cannot_be_seen() -> None:
    model, accumulation = made()
    accumulation.open()
    for samples in (None, 4):
        accumulation.add(ga.Loss.mean(mean(model, data(4)[0]), over=4), samples=samples)
    update = accumulation.close()
    assert (update.samples, update.micro_batch_size, update.micro_batches) == (None, None, 2)
    assert accumulation.counts.samples == 4


def test_the_total_of_the_window_before_is_expected_again() -> None:
    """3 tokens of the first micro-batch let 6 be expected; the window before had 8."""
    model, accumulation = made()
    for is_first in (True, False):
        accumulation.open(first_share=(1, 2))
        for count in (3, 5):
            accumulation.add(ga.Loss.sum(losses(model, data(2)[0]).sum(), over=count), samples=2)
        normaliser = accumulation._normaliser
        assert normaliser is not None
        assert normaliser.correction == (6 / 8 if is_first else None)
        accumulation.close()


# ----------------------------------------------------------------------------------------- nothing is left of a failure
def fails_in_the_loss(model: nn.Module) -> Any:
    return losses(model, data(2)[0])  # not reduced


def fails_in_backward(model: nn.Module) -> Tensor:
    loss = mean(model, data(2)[0])
    loss.register_hook(lambda gradient: 1 / 0)
    return loss


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    ("failing", "error"),
    [
        pytest.param(fails_in_the_loss, ga.LossError, id="loss"),
        pytest.param(fails_in_backward, ZeroDivisionError, id="backward"),
        pytest.param(lambda _: None, ga.LossError, id="None"),
    ],
)
def test_a_micro_batch_that_fails_discards_its_window(
    failing: Callable[[nn.Module], Any], error: type[Exception], before: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, accumulation = made()
    run(accumulation, model, data(*[2] * before))
    with pytest.raises(error):
        accumulation.add(failing(model), samples=2)
    assert clean(model, accumulation)
    assert ("discarded with its first 2 micro-batches" in caplog.text) == bool(before)
    run(accumulation, model, data(2))
    assert accumulation.close().index == 1, "what was thrown away is no update"


# ----------------------------------------------------------------------------------- parameters that no optimizer holds
@pytest.mark.parametrize("scaled", [False, True])
def test_parameters_left_out_of_the_optimizer_change_nothing(scaled: bool) -> None:
    """They get gradients that nobody unscales; the norm is of those that are trained."""
    torch.manual_seed(1)
    body, head = nn.Linear(3, 3), nn.Linear(3, 1)
    model = nn.Sequential(body, head)
    scaler = GradScaler("cpu", init_scale=65536.0) if scaled else None
    accumulation = Accumulation(model, SGD(head.parameters(), lr=0.1), Options(clip_norm=1e9, scaler=scaler))
    x = torch.randn(4, 3)
    value = mean(model, x)
    gradients = torch.autograd.grad(value, [*head.parameters()])
    expected = [p.detach() - 0.1 * g for p, g in zip(head.parameters(), gradients, strict=True)]

    accumulation.open()
    accumulation.add(mean(model, x), samples=4)
    assert body.weight.grad is not None
    update = accumulation.close()

    torch.testing.assert_close([p.detach() for p in head.parameters()], expected)
    torch.testing.assert_close(update.grad_norm, nn.utils.get_total_norm(gradients))
    assert clean(model, accumulation), "nor is a gradient left in the others"


def test_a_bad_gradient_outside_of_the_optimizer_does_no_harm() -> None:
    body, head = nn.Linear(3, 3), nn.Linear(3, 1)
    options = Options(clip_norm=1.0, scaler=GradScaler("cpu"))
    accumulation = Accumulation([body, head], SGD(head.parameters(), lr=0.1), options)
    body.weight.register_hook(lambda gradient: gradient * float("nan"))
    accumulation.open()
    accumulation.add(mean(nn.Sequential(body, head), torch.randn(4, 3)), samples=4)
    assert not accumulation.close().skipped
    assert head.weight.isfinite().all()


# ---------------------------------------------------------------------------------------------- the gradient, no update
@pytest.mark.parametrize("scaled", [False, True])
def test_closed_into_grad(scaled: bool) -> None:
    model, accumulation = made(scaler=GradScaler("cpu", init_scale=1024.0) if scaled else None, clip_norm=1e-9)
    batches = data(4, 1)
    mean(model, torch.cat(batches)).backward()
    assert model.weight.grad is not None
    expected = 2 * model.weight.grad

    aside = accumulation.set_aside()
    accumulation.open(first_share=(1, 2))
    run(accumulation, model, batches)
    loss = accumulation.close_into_grad(aside)

    rounding = 1e-7 if scaled else FP64  # a loss scale is fp32
    torch.testing.assert_close(model.weight.grad, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(loss.value, mean(model, torch.cat(batches)).detach(), rtol=FP64, atol=FP64)
    assert (loss.weight, loss.is_mean) == (5, True)
    assert not loss.root.requires_grad
    assert accumulation.counts.updates == 0
    assert not accumulation.is_open


# -------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("bad", [-1, "7", torch.ones(3), float("nan"), None, {"lm": -1}], ids=repr)
def test_weights_that_are_no_counts(bad: Any) -> None:
    with pytest.raises(ga.LossError, match="weights="):
        weights_by_name(bad)


def test_weights_add_up_by_name() -> None:
    assert weights_by_name(7) == {"": 7}
    assert add_weights({"lm": 7, "aux": torch.tensor(2)}, {"aux": 3, "new": 1.5}) == {"lm": 7, "aux": 5, "new": 1.5}
