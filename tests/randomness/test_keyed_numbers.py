"""The distributions, and that a sample's numbers are its own. Tests of chance are for one named seed each."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradaccum.randomness.keyed_numbers import Draw, bernoulli, exponential, integers, normal, uniform

SEEDS = [11, 12, 13]
SIGMAS = 4.5
"""Of a statistic that is normal nearly: one of 150,000 is further away by chance, and the seeds are fixed."""

KINDS: dict[str, Callable[[Draw], Tensor]] = {
    "mask": lambda draw: bernoulli(draw, 0.3),
    "uniform 32": lambda draw: uniform(draw, torch.float32),
    "uniform 64": lambda draw: uniform(draw, torch.float64),
    "uniform 16": lambda draw: uniform(draw, torch.bfloat16),
    "normal 32": lambda draw: normal(draw, torch.float32),
    "normal 64": lambda draw: normal(draw, torch.float64),
    "exponential": exponential,
    "integers": lambda draw: integers(draw, -3, 14),
    "long integers": lambda draw: integers(draw, 0, 1 << 40),
}


def draw_of(shape: tuple[int, ...], dim: int | None = 0, samples: list[int] | None = None, seed: int = 1) -> Draw:
    positions = torch.arange(shape[dim] if dim is not None else 0) if samples is None else torch.tensor(samples)
    return Draw(shape=shape, dim=dim, samples=positions, name=(seed, 2, 3), device=torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [(), (7,), (1, 1), (5, 3), (5, 6, 9), (2, 3, 5, 4), (0, 3), (200, 150)])
def test_numbers_belong_to_samples(kind: str, rest: tuple[int, ...]) -> None:
    whole = KINDS[kind](draw_of((5, *rest)))
    assert whole.shape == (5, *rest)
    part = KINDS[kind](draw_of((3, *rest), samples=[4, 0, 2]))
    assert torch.equal(part, whole[[4, 0, 2]])
    if rest:
        moved = KINDS[kind](draw_of((rest[0], 5, *rest[1:]), dim=1))
        assert torch.equal(moved, whole.movedim(0, 1))
    if len(rest) > 1 and min(rest) > 1:  # trimmed padding
        assert torch.equal(KINDS[kind](draw_of((5, rest[0] - 1, *rest[1:]))), whole[:, : rest[0] - 1])
        assert torch.equal(KINDS[kind](draw_of((5, *rest[:-1], rest[-1] - 1))), whole[..., :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_several_entries_of_a_sample_and_none(kind: str) -> None:
    whole = KINDS[kind](draw_of((10, 4), samples=list(range(5))))
    assert torch.equal(KINDS[kind](draw_of((4, 4), samples=[1, 3])), whole.view(5, 2, 4)[[1, 3]].view(4, 4))
    once = KINDS[kind](draw_of((6, 4), dim=None, samples=[0, 1]))
    assert torch.equal(once, KINDS[kind](draw_of((6, 4), dim=None, samples=[3])))
    assert KINDS[kind](draw_of((0, 4))).shape == (0, 4)
    assert KINDS[kind](draw_of((), dim=None)).shape == ()


def test_masks_are_written_in_place() -> None:
    for shape in ((3, 16, 5), (3, 5, 4), (3,)):
        out = torch.full(shape, 7.0)
        assert bernoulli(draw_of(shape), 0.3, out=out) is out
        assert torch.equal(out, bernoulli(draw_of(shape), 0.3).float())
    turned = torch.full((5, 3), 7.0).T
    assert torch.equal(bernoulli(draw_of((3, 5)), 0.3, out=turned), bernoulli(draw_of((3, 5)), 0.3).float())


def test_masks_of_certainty() -> None:
    assert bernoulli(draw_of((100, 8)), 1.0).all()
    assert not bernoulli(draw_of((100, 8)), 0.0).any()


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """How many standard deviations a chi-square statistic is from its mean (Wilson and Hilferty 1931)."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def runs(bits: Tensor, chance: float) -> float:
    """How many standard deviations the number of runs in a sequence of bits is from its mean (Wald and Wolfowitz)."""
    n, same = len(bits), (bits[1:] == bits[:-1]).double().mean().item()
    both = chance**2 + (1 - chance) ** 2
    variance = both * (1 - both) + 2 * (chance**3 + (1 - chance) ** 3 - both**2)  # of neighbours that share a bit
    return (same - both) / math.sqrt(variance / (n - 1))


UNIFORM: dict[str, Callable[[Draw], Tensor]] = {
    "uniform 32": KINDS["uniform 32"],
    "uniform 64": KINDS["uniform 64"],
    "normal 32": lambda draw: torch.special.ndtr(KINDS["normal 32"](draw).double()),
    "normal 64": lambda draw: torch.special.ndtr(KINDS["normal 64"](draw)),
    "exponential": lambda draw: -torch.expm1(-exponential(draw)),
    "integers": lambda draw: (integers(draw, 0, 1000) + 0.5) / 1000,
    "long integers": lambda draw: integers(draw, 0, 1 << 40) / 2**40,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", UNIFORM)
def test_the_distribution(kind: str, seed: int) -> None:
    """Chi-square over 100 cells, and runs above and below the median in every direction of the draw."""
    numbers = UNIFORM[kind](draw_of((40, 60, 50), seed=seed)).double()
    cells = (numbers.flatten() * 100).long().clamp(0, 99)
    counts = torch.bincount(cells, minlength=100).double()
    assert abs(chi_square(counts, torch.full((100,), numbers.numel() / 100.0).double())) < SIGMAS
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)):
        assert abs(runs(numbers.permute(order).flatten() < 0.5, 0.5)) < SIGMAS, order


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_masks(chance: float, seed: int) -> None:
    mask = bernoulli(draw_of((40, 64, 50), seed=seed), chance)
    n = mask.numel()
    assert abs(mask.double().mean().item() - chance) < SIGMAS * math.sqrt(chance * (1 - chance) / n)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)):
        assert abs(runs(mask.permute(order).flatten(), chance)) < SIGMAS, order
    # Both uses of a word, and patterns of the eight elements of one counter.
    spread = chance * (1 - chance) / math.sqrt(n / 8)
    lanes = mask.view(40, 8, 8, 50).movedim(2, 0).flatten(1).double() - chance
    correlation = lanes @ lanes.T / lanes.shape[1]
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < SIGMAS * spread


def test_draws_updates_and_seeds_have_nothing_in_common() -> None:
    base = uniform(draw_of((64, 50)), torch.float64).flatten()
    names: list[Any] = [(1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1)]
    for name in names:
        draw = Draw(shape=(64, 50), dim=0, samples=torch.arange(64), name=name, device=torch.device("cpu"))
        other = uniform(draw, torch.float64).flatten()
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
        assert abs(correlation) < SIGMAS / math.sqrt(len(base))
        assert not (base[:, None] == other).any()
