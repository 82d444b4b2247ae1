"""The noise scale: the formulas by hand in float64, a problem whose answer is known, and where it is not measured."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gradaccum as ga
from ranks import results_of

FEATURES, OFFSET, SIGMA = 200, 0.05, 0.7
KNOWN = FEATURES * SIGMA**2 / (FEATURES * OFFSET**2)  # trace of the covariance over the squared gradient: 196 samples
KEPT = 0.995


class Means(nn.Module):
    """Half the squared distance to a point: the gradient of a sample x at 0 is -x."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.point - x).square().sum(1)


def still(model: nn.Module) -> torch.optim.SGD:
    """An optimizer that stays where it is."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def noisy(rows: int, generator: torch.Generator) -> Tensor:
    return OFFSET + SIGMA * torch.randn(rows, FEATURES, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kind", ["mean", "declared", "sum over", "plain sum"])
def test_within_a_tenth_where_it_is_known(kind: str) -> None:
    losses = {
        "mean": lambda each: each.mean(),
        "declared": lambda each: ga.Loss.mean(each.mean(), over=len(each)),
        "sum over": lambda each: ga.Loss.sum(each.sum(), over=len(each)),
        "plain sum": lambda each: ga.Loss.sum(each.sum()),
    }
    model, generator = Means(), torch.Generator().manual_seed(1)
    step = ga.TrainStep(
        model, still(model), lambda model, x: losses[kind](model(x)), micro_batch_size=13, noise_scale=True, check="off"
    )
    for index in range(500):
        update = step(noisy(97 + index % 7, generator))
    assert update.noise_scale == pytest.approx(KNOWN, rel=0.1)
    assert update.grad_norm is not None, "it was taken anyway"
    assert update.as_dict()["noise_scale"] == update.noise_scale


def by_hand(windows: list[list[tuple[Tensor, Tensor]]], model: nn.Module, kept: float = KEPT) -> float:
    """From each window's first micro-batch and the whole of it, both in one piece."""
    noise = signal = 0.0
    for window in windows:
        sizes, squares = [], []
        for x, y in (window[0], tuple(map(torch.cat, zip(*window, strict=True)))):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            squares.append(sum(gradient.square().sum().item() for gradient in gradients))
            sizes.append(len(x))
        trace = (squares[0] - squares[1]) / (1 / sizes[0] - 1 / sizes[1])
        noise, signal = kept * noise + trace, kept * signal + squares[1] - trace / sizes[1]
    assert min(noise, signal) > 0, "the problem has both"
    return noise / signal


def labelled(rows: int, *, ignored: bool) -> tuple[Tensor, Tensor]:
    """Labels that the features tell, so that there is a gradient besides the noise."""
    x = torch.randn(rows, 5).double()
    y = x[:, :3].argmax(1)
    if ignored:
        y[1::3] = -100
    return x, y


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 0.01}, {"fused": True}, {"fused": False}, {"persistent_gradients": True}, {"weights": True}],
    ids=repr,
)
def test_is_the_formula_whatever_the_counts(ignored: bool, options: dict[str, Any]) -> None:
    """Windows of ragged micro-batches, of which the weights are known only at the end: the expectation is wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    sizes = ([3, 11, 5], [7, 2, 4], [2, 13])
    windows = [[labelled(rows, ignored=ignored) for rows in rows_of] for rows_of in sizes]
    if options.get("weights"):
        options = {"weights": lambda batch: (batch[1] != -100).sum()}
    accumulator = ga.Accumulator(model, still(model), micro_batches=3, noise_scale=True, **options)
    criterion = ga.criterion(nn.CrossEntropyLoss())
    updates = []
    for x, y in accumulator.over([piece for window in windows for piece in window]):
        update = accumulator.backward(criterion(model(x), y))
        updates += [update] if update else []
    assert updates[-1].noise_scale == pytest.approx(by_hand(windows, model), rel=1e-9)


def test_infinite_where_averages_show_noise_alone() -> None:
    model = Means()
    step = ga.TrainStep(model, still(model), lambda m, x: m(x).mean(), micro_batch_size=2, noise_scale=True)
    x = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[:, None].expand(4, FEATURES)
    assert step(x).noise_scale == math.inf


def test_a_scaler_is_divided_out() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    windows = [[labelled(rows, ignored=False) for rows in (4, 3, 6)] for _ in range(3)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accumulator = ga.Accumulator(model, still(model), micro_batches=3, noise_scale=True, scaler=scaler)
    for x, y in accumulator.over([piece for window in windows for piece in window]):
        update = accumulator.backward(F.cross_entropy(model(x.float()), y))
    assert update is not None
    assert update.noise_scale == pytest.approx(by_hand(windows, model.double()), rel=1e-4)


def test_what_says_nothing_changes_nothing() -> None:
    """A window of one micro-batch, one that is not finite, and one that weighs nothing."""
    model, generator = Means(), torch.Generator().manual_seed(1)
    step = ga.TrainStep(
        model, still(model), lambda m, x: ga.Loss.mean(m(x).mean(), over=len(x)), micro_batch_size=13, noise_scale=True
    )
    assert step(noisy(13, generator)).noise_scale is None
    before = step(noisy(97, generator)).noise_scale
    assert before is not None
    assert step(noisy(13, generator)).noise_scale == before
    skipped = step(noisy(97, generator) * math.inf)
    assert (skipped.skipped, skipped.noise_scale) == (True, before)
    assert step(noisy(97, generator)).noise_scale != before


def test_goes_on_where_it_stopped() -> None:
    def trained(step: ga.TrainStep, updates: int, generator: torch.Generator) -> float | None:
        return [step(noisy(61, generator)).noise_scale for _ in range(updates)][-1]

    def new() -> ga.TrainStep:
        model = Means()
        loss_fn = lambda model, x: model(x).mean()  # noqa: E731
        return ga.TrainStep(model, still(model), loss_fn, micro_batch_size=13, noise_scale=True)

    whole = trained(new(), 6, torch.Generator().manual_seed(2))
    generator, first, second = torch.Generator().manual_seed(2), new(), new()
    trained(first, 3, generator)
    second.load_state_dict(first.state_dict())
    assert trained(second, 3, generator) == whole
    with pytest.raises(ga.StateError, match="averages 'noise' and 'signal'"):
        second.load_state_dict({**first.state_dict(), "noise_scale": {"noise": 1}})


def test_is_none_unless_it_is_asked_for() -> None:
    model = nn.Linear(3, 1)
    step = ga.TrainStep(model, still(model), lambda m, x: m(x).square().mean(), micro_batch_size=4)
    update = step(torch.randn(13, 3))
    assert (update.noise_scale, update.grad_norm) == (None, None)
    assert "noise_scale" not in {**step.state_dict(), **update.as_dict()}


def test_terms_with_totals_of_their_own_are_not_measured() -> None:
    model = nn.Linear(3, 2)

    def loss_fn(model: nn.Module, x: Tensor) -> dict[str, ga.Loss]:
        out = model(x)
        return {"a": ga.Loss.mean(out[:, 0].mean(), over=len(x)), "b": ga.Loss.mean(out.square().mean(), over=9)}

    step = ga.TrainStep(
        model, still(model), loss_fn, micro_batch_size=4, noise_scale=True, check="off",
        weights=lambda x: {"a": len(x), "b": 9 * -(-len(x) // 4)},
    )  # fmt: skip
    assert step(torch.randn(12, 3)).noise_scale is None


@pytest.mark.parametrize(
    "options",
    [
        {"loss_fn": lambda m, x: m(x).mean(), "split": ga.split_by_cost(lambda x: torch.ones(len(x)), 4)},
        {"loss_fn": lambda m, x: m(x).mean(), "lockstep": True},
        {"forward": lambda m, x: m(x), "batch_loss": lambda out, x: out.mean()},
    ],
    ids=["split", "lockstep", "batch_loss"],
)
def test_is_refused_where_it_would_be_biased(options: dict[str, Any]) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ga.UnsupportedError, match=r"not the gradient of a random part .* Leave noise_scale= out"):
        ga.TrainStep(model, still(model), noise_scale=True, **options)
    with pytest.raises(ga.OptionError, match="noise_scale='yes' is of type str"):
        ga.TrainStep(model, still(model), noise_scale="yes", **options)


# ----------------------------------------------------------------------------------------------------------- processes
ROWS = ([5, 8, 3], [2, 6], [])


def on_every_rank(rank: int, world_size: int) -> list[float | None]:
    found: list[float | None] = []
    for how in ("plain", "DDP"):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        shares = [[labelled(rows, ignored=True) for rows in rows_of] for rows_of in ROWS]
        trained = nn.parallel.DistributedDataParallel(model) if how == "DDP" else model
        accumulator = ga.Accumulator(trained, still(model), micro_batches=3, noise_scale=True)
        criterion = ga.criterion(nn.CrossEntropyLoss())
        update = None
        for x, y in accumulator.over(shares[rank]):
            update = accumulator.backward(criterion(trained(x), y)) or update
        if update is not None:
            found.append(update.noise_scale)
            assert update.noise_scale == pytest.approx(over_ranks_by_hand(model, shares), rel=1e-9)
    sharded = fully_shard(nn.Linear(5, 3), mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(ga.UnsupportedError, match=r"gradients lie in parts .* with DistributedDataParallel"):
        ga.Accumulator(sharded, still(sharded), micro_batches=3, noise_scale=True)
    return found


def over_ranks_by_hand(model: nn.Module, shares: list[list[tuple[Tensor, Tensor]]]) -> float:
    """Each process's first micro-batch is one measurement of small ones, of a mean of their 1/n."""

    def square(x: Tensor, y: Tensor) -> float:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        return sum(gradient.square().sum().item() for gradient in gradients)

    firsts = [share[0] for share in shares if share]
    small = sum(square(*first) for first in firsts) / len(firsts)
    inverse = sum(1 / len(x) for x, _ in firsts) / len(firsts)
    x, y = map(torch.cat, zip(*[piece for share in shares for piece in share], strict=True))
    whole = square(x, y)
    trace = (small - whole) / (inverse - 1 / len(x))
    return trace / (whole - trace / len(x))


def test_over_processes() -> None:
    found = results_of(on_every_rank, 3)
    assert len(found[0]) == 2
    assert found[0] == found[1], "it is the same on every process that has a window"
