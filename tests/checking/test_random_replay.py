"""A micro-batch draws its own rows of what the whole batch draws; what belongs to no row is drawn anew and reported."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.checking.pieces import pieces, whole
from gradaccum.checking.random_ops import ONCE, Draws
from gradaccum.checking.random_replay import RandomReplay

ROWS, SIZES = 7, (3, 2, 2)


def drawn(draw: Callable[[Tensor], Any], x: Tensor, *, is_alike: bool = False) -> tuple[Any, list[Any], Draws]:
    """What the whole batch draws, and what its pieces do."""
    draws = Draws(ROWS)
    made: list[Any] = []
    for cut in ([whole(ROWS)], pieces(SIZES)):
        replay = RandomReplay(draws, {}, is_alike=is_alike)
        with replay:
            for piece in cut:
                with replay.forward(piece):
                    made.append(draw(x[piece.start : piece.stop]))
    return made[0], made[1:], draws


BY_SAMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout of channels": lambda x: F.dropout1d(x, 0.5),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "randomized leaky relu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "multinomial": lambda x: torch.multinomial(x[:, 0].softmax(-1), 2),
    "multinomial with replacement": lambda x: torch.multinomial(x[:, 0].softmax(-1), 9, replacement=True),
    "normal": lambda x: torch.normal(x, 0.1) + torch.normal(0.0, x.abs()) + torch.normal(x, x.abs()),
    "filled": lambda x: x.new_empty(len(x), 3).uniform_(-1, 1) + x.new_empty(len(x), 3).exponential_(2.0),
    "made": lambda x: torch.rand(len(x), 2) + torch.randn(len(x), 2) + torch.normal(0.0, 1.0, (len(x), 2)),
    "made alike": lambda x: torch.rand_like(x) + torch.randn_like(x),
    "integers": lambda x: torch.randint(0, 1000, (len(x),)) + torch.randint_like(x[:, 0, 0], 1000),
    "gamma": lambda x: torch.distributions.Gamma(x.exp(), 1.0).sample(),
    "poisson": lambda x: torch.poisson(x.exp()),
    "generator of its own": lambda x: torch.rand(len(x), generator=torch.Generator().manual_seed(3)),
    "half precision": lambda x: F.dropout(x.bfloat16(), 0.5).float(),
    "several draws": lambda x: F.dropout(F.dropout(x, 0.5) + torch.rand(len(x), 1, 1), 0.5),
}


@pytest.mark.parametrize("draw", BY_SAMPLE.values(), ids=BY_SAMPLE.keys())
def test_rows_of_the_whole_batch(draw: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(ROWS, 4, 5)
    batch, parts, draws = drawn(draw, x)
    torch.testing.assert_close(torch.cat(parts), batch, rtol=1e-5, atol=1e-6)  # float32, in other shapes
    assert not draws.not_replayed
    assert len(batch.unique(dim=0)) > 1  # something was drawn, and not the same for all


@pytest.mark.parametrize(
    ("draw", "x", "dimension"),
    [
        (lambda x: F.dropout(x.transpose(0, 1), 0.5), torch.ones(ROWS, 4, 5), 1),
        (lambda x: F.dropout(x.flatten(0, 1), 0.5), torch.ones(ROWS, 4, 5), 0),
        (lambda x: F.dropout(x[x > 0], 0.5), torch.tensor([1.0, 0, 2, 3, 0, 4, 5]), 0),
    ],
    ids=["samples in the second dimension", "flattened samples", "as many rows as the data has"],
)
def test_rows_that_are_found_by_shape(draw: Callable[[Tensor], Tensor], x: Tensor, dimension: int) -> None:
    batch, parts, draws = drawn(draw, x)
    assert torch.equal(torch.cat(parts, dimension), batch)
    assert not draws.not_replayed


DRAWN_ONCE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a number": (lambda x: torch.rand(()), "torch.rand"),
    "a beta": (lambda x: torch.distributions.Beta(0.4, 0.4).sample(), "a Beta or Dirichlet"),
    "of the features": (lambda x: F.dropout(x[0], 0.5), "dropout or torch.bernoulli"),
    "a permutation": (lambda x: torch.randperm(len(x)).float().var(), "torch.randperm"),
    "partners": (lambda x: torch.randint(len(x), (len(x),)), "torch.randint"),
}


@pytest.mark.parametrize(("draw", "said"), DRAWN_ONCE.values(), ids=DRAWN_ONCE.keys())
def test_once_for_each_forward(draw: Callable[[Tensor], Any], said: str) -> None:
    x = torch.ones(ROWS, 40)
    _, parts, draws = drawn(draw, x)
    assert draws.not_replayed == {("the loss", said): ONCE}
    if said != "torch.randperm":
        assert not torch.equal(parts[1], parts[2])  # anew in each
    _, shared, _ = drawn(draw, x, is_alike=True)
    assert torch.equal(shared[1], shared[2])


def test_the_module_that_draws_is_named() -> None:
    class Draws1(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(())

    model = nn.Sequential(nn.Linear(3, 3), Draws1())
    draws = Draws(ROWS)
    for piece in (whole(ROWS), pieces(SIZES)[0]):
        replay = RandomReplay(draws, {"": model, "1": model[1]})
        with replay, replay.forward(piece):
            model(torch.ones(piece.rows, 3))
    assert draws.not_replayed == {("1", "torch.rand"): ONCE}


@pytest.mark.parametrize("source", ["random", "numpy"])
def test_generators_that_no_operation_shows(source: str) -> None:
    numpy = pytest.importorskip("numpy")
    _, _, draws = drawn(lambda x: random.random() if source == "random" else numpy.random.rand(), torch.ones(ROWS))
    assert draws.not_replayed == {("the loss", "Python's random or NumPy"): ONCE}


def test_the_same_numbers_again_when_the_random_state_is_put_back() -> None:
    replay = RandomReplay(Draws(ROWS), {})
    with replay, replay.forward(whole(ROWS)):
        torch.rand(ROWS)
        state = torch.get_rng_state()
        first = torch.rand(ROWS)
        torch.rand(3)
        torch.set_rng_state(state)  # as activation checkpointing does
        assert torch.equal(torch.rand(ROWS), first)


def test_draws_are_of_the_right_law() -> None:
    """1,000 rows of 100: means within 5 standard errors of what they should be."""
    replay = RandomReplay(Draws(1000), {})
    with replay, replay.forward(whole(1000)):
        uniform, normal = torch.rand(1000, 100), torch.randn(1000, 100)
        kept = F.dropout(torch.ones(1000, 100), 0.25)
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(normal.mean()) < 5 / 1e5**0.5
    assert abs(normal.std() - 1) < 5 / 2e5**0.5
    assert abs((kept == 0).float().mean() - 0.25) < 5 * (0.1875 / 1e5) ** 0.5
    assert kept.max() == pytest.approx(1 / 0.75)
