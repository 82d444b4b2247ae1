"""Several models and optimizers: trained together by one accumulator, or two accumulators that share a pass (a GAN)."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradaccum as ga
from oracle import Gradients, assert_same_gradients, gradients_of, parameters_of, seen_by

NOISE, DATA = 2, 3
ROWS = 13
Z = torch.randn(3 * ROWS, NOISE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REAL = torch.randn(3 * ROWS, DATA, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

sizes_of_micro_batches = st.lists(st.integers(1, 5), min_size=2, max_size=7)


class Pair:
    """A generator, a discriminator, and an optimizer each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(NOISE, 4), nn.Tanh(), nn.Linear(4, DATA)).double()
        self.judge = nn.Sequential(nn.Linear(DATA, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.of_generator = torch.optim.SGD(self.generator.parameters(), lr=0.1)
        self.of_judge = torch.optim.SGD(self.judge.parameters(), lr=0.1)

    def losses(self, z: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's and the judge's, both a mean over samples, both from before either is updated."""
        fake = self.generator(z)
        judged, judged_real, judged_fake = self.judge(fake), self.judge(real), self.judge(fake.detach())
        return F.softplus(-judged).mean(), (F.softplus(-judged_real) + F.softplus(judged_fake)).mean()

    def parameters(self) -> dict[str, Tensor]:
        return {
            **{f"generator.{name}": value for name, value in parameters_of(self.generator).items()},
            **{f"judge.{name}": value for name, value in parameters_of(self.judge).items()},
        }


def accumulators(pair: Pair, *micro_batches: int, **options: Any) -> tuple[ga.Accumulator, ga.Accumulator]:
    """The generator's and the judge's; windows of as many micro-batches each, or of one number for both."""
    return (
        ga.Accumulator(pair.generator, pair.of_generator, micro_batches=micro_batches[0], **options),
        ga.Accumulator(pair.judge, pair.of_judge, micro_batches=micro_batches[-1], **options),
    )


def train(
    pair: Pair, generator: ga.Accumulator, judge: ga.Accumulator, stream: Iterable[Any], forgotten: str = ""
) -> None:
    for z, real in judge.over(generator.over(stream)):
        for_generator, for_judge = pair.losses(z, real)
        # The generator first: the judge's update would change what its loss has to go back through.
        if forgotten != "generator":
            generator.backward(for_generator)
        if forgotten != "judge":
            judge.backward(for_judge)


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    rows = sum(sizes)
    return list(zip(Z[:rows].split(sizes), REAL[:rows].split(sizes), strict=True))


def joined(window: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([z for z, _ in window]), torch.cat([real for _, real in window])


def whole(windows: list[list[tuple[Tensor, Tensor]]]) -> tuple[list[Gradients], list[Gradients], dict[str, Tensor]]:
    """Both gradients from the same parameters, then both updates."""
    pair = Pair()
    of_generator: list[Gradients] = []
    of_judge: list[Gradients] = []
    for window in windows:
        for_generator, for_judge = pair.losses(*joined(window))
        pair.generator.zero_grad()
        for_generator.backward()
        of_generator.append(gradients_of(pair.generator))
        pair.judge.zero_grad()  # of what the generator's loss left in it
        for_judge.backward()
        of_judge.append(gradients_of(pair.judge))
        pair.of_generator.step()
        pair.of_judge.step()
    return of_generator, of_judge, pair.parameters()


def windows_of(stream: list[Any], lengths: list[int]) -> list[list[Any]]:
    windows, at = [], 0
    while at < len(stream):
        length = lengths[len(windows) % len(lengths)]
        windows.append(stream[at : at + length])
        at += length
    return windows


@given(sizes=sizes_of_micro_batches, micro_batches=st.integers(1, 4), has_length=st.booleans())
def test_two_that_share_a_pass_are_each_exact(sizes: list[int], micro_batches: int, has_length: bool) -> None:
    pair, stream = Pair(), batches(sizes)
    generator, judge = accumulators(pair, micro_batches)
    with seen_by(pair.of_generator, pair.generator) as of_generator, seen_by(pair.of_judge, pair.judge) as of_judge:
        train(pair, generator, judge, stream if has_length else iter(stream))

    expected_generator, expected_judge, expected = whole(windows_of(stream, [micro_batches]))
    assert len(of_generator) == len(expected_generator)
    for made, right in zip(of_generator + of_judge, expected_generator + expected_judge, strict=True):
        assert_same_gradients(made, right)
    assert_same_gradients(pair.parameters(), expected)
    assert generator.updates == judge.updates == len(expected_judge)


@pytest.mark.parametrize(
    ("forgotten", "micro_batches", "error", "message"),
    [
        ("generator", 2, ga.MisuseError, r"micro-batch of 3 samples .* backward\(\) was not called"),
        ("judge", 2, ga.MisuseError, r"micro-batch of 3 samples .* backward\(\) was not called"),
        ("", 4, ga.WindowError, "no window is ever complete"),
    ],
)
def test_an_error_ends_both_windows(forgotten: str, micro_batches: int, error: type[Exception], message: str) -> None:
    pair = Pair()
    generator, judge = accumulators(pair, micro_batches, tail="drop")
    with pytest.raises(error, match=message):
        train(pair, generator, judge, iter(batches([3, 2])), forgotten)
    for model in (pair.generator, pair.judge):
        assert all(parameter.grad is None for parameter in model.parameters()), "no half window stays behind in either"


# Models that train together.


def together(models: list[nn.Module], batch: tuple[Tensor, Tensor]) -> Tensor:
    encoder, decoder = models
    return F.mse_loss(decoder(encoder(batch[1])), batch[1])


def make_two() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(DATA, NOISE).double(), nn.Linear(NOISE, DATA).double()]


def optimizers_of(models: list[nn.Module], count: int) -> list[torch.optim.Optimizer]:
    if count == 1:
        return [torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)]
    return [torch.optim.SGD(models[0].parameters(), lr=0.1), torch.optim.SGD(models[1].parameters(), lr=0.2)]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("num_optimizers", [1, 2])
@pytest.mark.parametrize("way", ["own loop", "whole batch in hand"])
def test_models_that_train_together(way: str, num_optimizers: int, clip_norm: float | None) -> None:
    sizes = [3, 1, 5, 4]
    windows = [batches(sizes), batches(sizes)]
    models, expected = make_two(), make_two()
    optimizers = optimizers_of(models, num_optimizers)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    if way == "own loop":
        accumulator = ga.Accumulator(models, optimizers, micro_batches=4, clip_norm=clip_norm, scheduler=schedulers)
        for batch in accumulator.over([batch for window in windows for batch in window]):
            accumulator.backward(together(models, batch))
    else:
        step = ga.TrainStep(models, optimizers, together, micro_batch_size=4, clip_norm=clip_norm, scheduler=schedulers)
        for window in windows:
            step(joined(window))

    optimizers = optimizers_of(expected, num_optimizers)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for window in windows:
        for model in expected:
            model.zero_grad()
        together(expected, joined(window)).backward()
        if clip_norm is not None:  # over all of them together
            nn.utils.clip_grad_norm_([p for model in expected for p in model.parameters()], clip_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    for model, right in zip(models, expected, strict=True):
        assert_same_gradients(parameters_of(model), parameters_of(right))
