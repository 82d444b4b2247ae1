"""One window: opened, added to, closed or discarded; whatever goes wrong, the next one starts clean."""

import logging
import warnings
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


def test_the_update_is_the_whole_batchs() -> None:
    model, accumulation = made()
    batches = data(4, 4, 1)
    whole = torch.cat(batches)
    value = mean(model, whole)
    expected = [
        p.detach() - 0.1 * g
        for p, g in zip(model.parameters(), torch.autograd.grad(value, [*model.parameters()]), strict=True)
    ]

    accumulation.open(first_share=(4, 12))
    run(accumulation, model, batches)
    update = accumulation.close()

    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=FP64, atol=FP64)
    torch.testing.assert_close(update.loss, value.detach(), rtol=FP64, atol=FP64)
    assert (update.index, update.samples, update.micro_batches, update.micro_batch_size) == (1, 9, 3, 4)
    assert update.weight == 9
    assert update.seconds > 0
    assert not update.skipped
    assert clean(model, accumulation)


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


def test_a_micro_batch_heavier_than_the_whole_was_expected_to_be() -> None:
    model, accumulation = made()
    (x, y), before = data(2, 2), model.weight.detach().clone()
    value = (losses(model, x).sum() + losses(model, y).sum()) / 201
    [gradient] = torch.autograd.grad(value, [model.weight])
    accumulation.open(first_share=(1, 2))
    for batch, tokens in ((x, 1), (y, 200)):
        accumulation.add(ga.Loss.sum(losses(model, batch).sum(), over=tokens), samples=2)
    torch.testing.assert_close(accumulation.close().loss, value.detach(), rtol=FP64, atol=FP64)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * gradient, rtol=FP64, atol=FP64)


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


def test_an_optimizer_that_fails_discards_the_window() -> None:
    model, accumulation = made()
    handle = accumulation.optimizers[0].register_step_pre_hook(lambda *_: {}["out of memory"])
    run(accumulation, model, data(2))
    with pytest.raises(KeyError, match="out of memory"):
        accumulation.close()
    handle.remove()
    assert clean(model, accumulation)
    run(accumulation, model, data(2))
    assert accumulation.close().index == 1


def test_totals_that_do_not_add_up_discard_the_window() -> None:
    model, accumulation = made()
    before = model.weight.detach().clone()
    run(accumulation, model, data(2, 2), totals={"": 7})
    with pytest.raises(ga.LossError, match="given as 7, and its micro-batches add up to 4"):
        accumulation.close()
    assert clean(model, accumulation)
    assert torch.equal(model.weight, before)


def test_a_window_without_gradients() -> None:
    model, accumulation = made()
    accumulation.open()
    other = torch.ones(2, requires_grad=True)
    accumulation.add(other.mean(), samples=2)
    with pytest.raises(ga.LossError, match=r"0 of 2 trainable parameters got a gradient.*detached on the way\?"):
        accumulation.close()
    assert clean(model, accumulation)


def test_a_left_over_gradient_is_found_before_the_window() -> None:
    model, accumulation = made()
    mean(model, data(2)[0]).backward()
    with pytest.raises(ga.MisuseError, match="before the window's first micro-batch"):
        accumulation.open()
    assert not accumulation.is_open


# ------------------------------------------------------------------------------------------------------ skipped updates


def test_a_window_that_weighs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, accumulation = made()
    before = model.weight.detach().clone()
    accumulation.open()
    for _ in range(2):
        accumulation.add(ga.Loss.sum(losses(model, data(2)[0]).sum(), over=0), samples=2)
    update = accumulation.close()
    assert update.skipped
    assert update.weight == 0
    assert update.loss.isnan()
    assert torch.equal(model.weight, before)
    assert "update 1 was skipped: the weight of its batch is 0" in caplog.text
    assert accumulation.counts.updates == 1, "the index counts on"


def test_a_gradient_that_is_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    model, accumulation = made(clip_norm=1.0)
    before = model.weight.detach().clone()
    accumulation.open()
    accumulation.add(mean(model, data(2)[0] * float("inf")), samples=2)
    update = accumulation.close()
    assert update.skipped
    assert update.grad_norm is not None
    assert not update.grad_norm.isfinite()
    assert torch.equal(model.weight, before)
    assert "update 1 was skipped: its gradient is not finite" in caplog.text


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


def test_parameters_added_while_training() -> None:
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64))
    optimizer = SGD(model[1].parameters(), lr=0.1)
    accumulation = Accumulation(model, optimizer)
    optimizer.add_param_group({"params": model[0].parameters()})
    before = model[0].weight.detach().clone()
    run(accumulation, model, data(2))
    accumulation.close()
    assert not torch.equal(model[0].weight, before)


def test_unfrozen_while_training() -> None:
    model, accumulation = made()
    model.weight.requires_grad_(False)
    for frozen in (True, False):
        model.weight.requires_grad_(not frozen)
        before = model.weight.detach().clone()
        run(accumulation, model, data(2))
        accumulation.close()
        assert torch.equal(model.weight, before) == frozen


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


def test_closed_into_grad_several_terms() -> None:
    model, accumulation = made()
    accumulation.open(totals={"a": 2, "b": 5})
    x = data(2)[0]
    accumulation.add({"a": mean(model, x), "b": ga.Loss.sum(losses(model, x).sum(), over=5)}, samples=2)
    loss = accumulation.close_into_grad([None, None])
    assert loss.weight is None
    torch.testing.assert_close(loss.value, (losses(model, x).sum() * (1 / 2 + 1 / 5)).detach(), rtol=FP64, atol=FP64)


# -------------------------------------------------------------------------------------------------------------- telling


def test_the_plan_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _, accumulation = made()
    with caplog.at_level(logging.INFO, "gradaccum"):
        accumulation.plan_line.announce([4, 4, 2], updates_per_epoch=3)
        accumulation.plan_line.announce([4, 4, 2])
    assert caplog.messages == ["batch 10 = 3 micro-batches of 2 to 4 | exact | 3 updates an epoch"]


def test_batch_norm_is_warned_of_once_and_only_if_the_batch_is_split(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    accumulation = Accumulation(model, SGD(model.parameters(), lr=0.1))
    with caplog.at_level(logging.INFO, "gradaccum"), warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulation.plan_line.announce([8])
    assert caplog.messages == ["batch 8 = 1 micro-batch x 8 | exact"]
    with pytest.warns(ga.BatchNormWarning, match=r"1 BatchNorm layer in training mode \(1\)"):
        accumulation.plan_line.announce([4, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulation.plan_line.announce([4, 4])


# ---------------------------------------------------------------------------------------------------------------- state


def test_the_state_is_counters() -> None:
    model, accumulation = made()
    run(accumulation, model, data(4, 2))
    accumulation.close()
    state = accumulation.state_dict()
    assert state == {"updates": 1, "micro_batches": 2, "samples": 6}
    _, resumed = made()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


def test_no_state_of_an_open_window() -> None:
    model, accumulation = made()
    run(accumulation, model, data(4, 2))
    with pytest.raises(
        ga.StateError, match=r"A window is open, with 2 micro-batches \(6 samples\).*Save right after an update"
    ):
        accumulation.state_dict()
    with pytest.raises(ga.StateError, match=r"A window is open, with 2 micro-batches.*Load before training starts"):
        accumulation.load_state_dict({"updates": 0, "micro_batches": 0, "samples": 0})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no count of updates, micro_batches, samples; it is a dict that holds none"),
        (
            {"updates": 1, "samples": 3.5, "x": 1},
            "no count of micro_batches, samples; it is a dict that holds updates, ",
        ),
    ],
)
def test_what_is_no_state(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ga.StateError, match=message):
        made()[1].load_state_dict(state)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bad", [-1, "7", torch.ones(3), float("nan"), None, {"lm": -1}], ids=repr)
def test_weights_that_are_no_counts(bad: Any) -> None:
    with pytest.raises(ga.LossError, match="weights="):
        weights_by_name(bad)


def test_weights_add_up_by_name() -> None:
    assert weights_by_name(7) == {"": 7}
    assert add_weights({"lm": 7, "aux": torch.tensor(2)}, {"aux": 3, "new": 1.5}) == {"lm": 7, "aux": 5, "new": 1.5}
