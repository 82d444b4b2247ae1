"""Under autocast a forward never sees a parameter as it was before a change."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradaccum as ga
from casting import FEATURES, MICRO_BATCHES, ROWS, autocast, loss_fn, loss_without_cache, make, nesting
from oracle import parameters_of


@pytest.mark.parametrize("is_around", [False, True])
@pytest.mark.parametrize("way", ["own loop", "train step"])
def test_updates_are_seen_by_the_next_window(way: str, is_around: bool) -> None:
    """Also with autocast around the loop, where a loop in plain torch goes on with weights from before its update."""
    x = torch.randn(2 * ROWS, FEATURES)

    def train(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
        if way == "own loop":
            accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.5), micro_batches=MICRO_BATCHES)
            for micro_batch in accumulator.over(x.chunk(2 * MICRO_BATCHES)):
                accumulator.backward(loss(model, micro_batch))
        else:
            train_step = ga.TrainStep(model, SGD(model.parameters(), lr=0.5), loss, micro_batch_size=4)
            for batch in x.chunk(2):
                train_step(batch)
        return parameters_of(model)

    with autocast() if is_around else nullcontext():
        made = train(make(), loss_fn)
    expected = train(make(), loss_without_cache)
    for name, parameter in made.items():
        assert torch.equal(parameter, expected[name])


def test_weights_loaded_between_windows_are_seen_with_autocast_around_the_loop() -> None:
    model, other = make(), nn.Sequential(*make())
    nn.init.ones_(other[0].weight)
    x = torch.randn(ROWS, FEATURES)
    train_step = ga.TrainStep(model, SGD(model.parameters(), lr=0.5), loss_fn, micro_batch_size=4)
    with autocast():
        loss_fn(model, x)  # which makes casts
        model.load_state_dict(other.state_dict())
        update = train_step(x)
    torch.testing.assert_close(update.loss, loss_without_cache(other, x), rtol=1e-5, atol=1e-6)


def test_a_loop_in_plain_torch_goes_on_with_old_weights() -> None:
    """What the test before this one is about."""
    model = make()
    optimizer = SGD(model.parameters(), lr=0.5)
    x = torch.randn(ROWS, FEATURES)
    with autocast():
        before = model(x)
        before.float().square().mean().backward()
        optimizer.step()
        after = model(x)
    assert torch.equal(before, after)


def test_an_optimizer_beside_the_window_is_seen() -> None:
    """A generator that is trained by hand, inside the window of a discriminator."""
    other = make()
    by_hand = SGD(other.parameters(), lr=0.5)
    model = make()
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=MICRO_BATCHES)
    for x in accumulator.over(torch.randn(ROWS, FEATURES).chunk(MICRO_BATCHES)):
        before = loss_fn(other, x)
        before.backward()
        by_hand.step()
        by_hand.zero_grad()
        assert torch.equal(loss_fn(other, x), loss_without_cache(other, x))
        assert loss_fn(other, x) != before
        accumulator.backward(loss_fn(model, x))


def test_two_accumulators_see_each_others_updates() -> None:
    first, second = make(), make()
    ones = ga.Accumulator(first, SGD(first.parameters(), lr=0.5), micro_batches=2)
    twos = ga.Accumulator(second, SGD(second.parameters(), lr=0.5), micro_batches=3)
    for x in ones.over(twos.over(torch.randn(24, FEATURES).chunk(12))):
        for accumulator, model in ((ones, first), (twos, second)):
            loss = loss_fn(model, x)
            assert torch.equal(loss, loss_without_cache(model, x))
            accumulator.backward(loss)
            for one in (first, second):
                assert torch.equal(loss_fn(one, x), loss_without_cache(one, x))


def test_weights_moved_for_one_forward_are_seen_inside_a_window() -> None:
    """Weight noise, sharpness-aware steps, an evaluation with averaged weights: each forward casts anew."""
    model = make()
    accumulator = ga.Accumulator(model, SGD(model.parameters(), lr=0.1), micro_batches=MICRO_BATCHES)
    for x in accumulator.over(torch.randn(ROWS, FEATURES).chunk(MICRO_BATCHES)):
        clean = loss_fn(model, x)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        assert torch.equal(loss_fn(model, x), loss_without_cache(model, x))
        with torch.no_grad():
            model[0].weight.sub_(1.0)
        accumulator.backward(clean)
    assert nesting() == 0
