"""`ga.Window`: a loop that runs its backwards and its steps itself gets the whole batch's gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradaccum as ga
from oracle import EXACT, assert_same_gradients, gradients_of
from ranks import results_of

SIZES = [3, 1, 5, 4]
IGNORED = -100


def tokens(num_rows: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of seven positions with ragged numbers of labels, the fourth with none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 7, 5, generator=generator).double()
    lengths = torch.randint(1, 8, (num_rows, 1), generator=generator)
    lengths[3] = 0
    labels = torch.randint(0, 3, (num_rows, 7), generator=generator)
    return x, labels.where(torch.arange(7) < lengths, IGNORED)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten())


def whole(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Any, float]:
    model = copy.deepcopy(model)
    loss = loss_of(model, x, labels)
    loss.backward()
    return gradients_of(model), loss.item()


# ------------------------------------------------------------------------------------------------------------ it weighs
@pytest.mark.parametrize("divisor", [1, 4, 7])
@pytest.mark.parametrize("says", ["nothing", "over", "a loss", "a sum"])
def test_ragged_tokens_over_several_windows(says: str, divisor: int) -> None:
    model = model_of()
    window = ga.Window(model.parameters())
    for seed in (0, 1):
        x, labels = tokens(seed=seed)
        expected, expected_loss = whole(model, x, labels)
        for xs, ys in zip(x.split(SIZES), labels.split(SIZES), strict=True):
            loss, count = loss_of(model, xs, ys), int((ys != IGNORED).sum())
            if says == "nothing":
                weighed = window.weigh(loss)
                if count:
                    assert weighed is loss
            elif says == "over":
                weighed = window.weigh(loss, over=count)
            elif says == "a loss":
                weighed = window.weigh(ga.Loss.mean(loss, over=count))
            else:
                total = F.cross_entropy(model(xs).flatten(0, 1), ys.flatten(), reduction="sum")
                weighed = window.weigh(ga.Loss.sum(total, over=count))
            assert (
                torch.equal(weighed.detach(), loss.detach()) or abs(weighed.item() - loss.item()) < EXACT or not count
            )
            (weighed / divisor).backward()
        settled = window.settle()
        assert_same_gradients(gradients_of(model), expected)
        assert abs(settled.value.item() - expected_loss) < EXACT
        assert settled.weight == int((labels != IGNORED).sum())
        model.zero_grad()


def test_a_loop_that_divides_by_steps_is_wrong_here() -> None:
    model = model_of()
    x, labels = tokens()
    expected, _ = whole(model, x, labels)
    for xs, ys in zip(x.split(SIZES), labels.split(SIZES), strict=True):
        if (ys != IGNORED).any():
            (loss_of(model, xs, ys) / 4).backward()
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_gradients(gradients_of(model), expected, tolerance=0.05)


def test_a_plain_mean_over_samples() -> None:
    model, x = model_of(), torch.randn(13, 5).double()
    window = ga.Window(model)
    for xs in x.split(SIZES):
        window.weigh(model(xs).square().mean(), samples=len(xs)).backward()
    loss = window.settle()
    found = gradients_of(model)
    model.zero_grad()
    model(x).square().mean().backward()
    assert_same_gradients(found, gradients_of(model))
    assert loss.weight == 13


def test_a_loss_scale_stays() -> None:
    model = model_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = ga.Window(model.parameters(), scaler=scaler)
    x, labels = tokens()
    expected, _ = whole(model, x, labels)
    for xs, ys in zip(x.split(SIZES), labels.split(SIZES), strict=True):
        scaler.scale(window.weigh(loss_of(model, xs, ys)) / 4).backward()
    window.settle()
    scaler.unscale_(optimizer)
    assert_same_gradients(gradients_of(model), expected)


def test_a_loss_scale_that_nobody_spoke_of() -> None:
    model = model_of()
    window = ga.Window(model.parameters())
    x, labels = tokens()
    with pytest.raises(ga.MisuseError, match=r"began with 256 instead of 1 .* scaler="):
        (window.weigh(loss_of(model, x, labels)) * 256).backward()


def test_counts_on_the_graph_of_a_window_that_weighs_nothing() -> None:
    model = model_of()
    window = ga.Window(model.parameters())
    x, labels = tokens()
    window.weigh(loss_of(model, x[3:4], labels[3:4])).backward()
    assert window.settle().value.isnan()
    assert all(parameter.grad is None for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- it refuses
def test_what_cannot_be_seen() -> None:
    model, x = model_of(), torch.randn(4, 5).double()
    window = ga.Window(model.parameters())
    with pytest.raises(ga.LossError, match=r"cannot be seen what this loss is a mean over.* over=n"):
        window.weigh(model(x).norm())
    with pytest.raises(ga.LossError, match=r"a sum of means over 12, 4 items"):
        window.weigh(model(x).mean() + x.sum() * 0 + F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)))
    (x, y), (x_more, y_more), *_ = zip(*(part.split([3, 4, 6]) for part in tokens()), strict=True)
    window.weigh(loss_of(model, x, y), samples=3)
    with pytest.raises(ga.MeanError):
        window.weigh(loss_of(model, x_more, y_more), samples=4)
    assert window.discard()
    with pytest.raises(ga.ParameterError, match="got no parameters"):
        ga.Window(iter([]))


def test_backwards_are_counted() -> None:
    model, x = model_of(), torch.randn(4, 5).double()
    window = ga.Window(model.parameters())
    with pytest.raises(ga.MisuseError, match="after 0 losses were weighed"):
        window.settle()
    window.weigh(model(x).mean()).backward()
    window.weigh(model(x).mean())
    with pytest.raises(ga.StateError, match="1 weighed losses have not had their backward"):
        window.state_dict()
    with pytest.raises(ga.MisuseError, match="2 of them with a weight, and 1 of their backwards ran"):
        window.settle()
    assert window.discard() == 2
    assert window.discard() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = window.weigh(model(x).mean())
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(ga.MisuseError, match="2 of their backwards ran"):
        window.settle()


def test_gradients_of_something_else() -> None:
    model, x = model_of(), torch.randn(4, 5).double()
    window = ga.Window(model.parameters())
    model(x).sum().backward()
    loss = window.weigh(model(x).mean())
    with pytest.raises(ga.MisuseError, match=r"have a .grad before the window's first micro-batch"):
        loss.backward()


# ----------------------------------------------------------------------------------------------------------- it resumes
def test_it_goes_on_inside_a_window_bit_by_bit(tmp_path: Any) -> None:
    model = model_of()
    parts = list(zip(*(part.split(SIZES) for part in tokens()), strict=True))

    def weigh(window: ga.Window, which: list[Any]) -> None:
        for xs, ys in which:
            window.weigh(loss_of(model, xs, ys)).backward()

    window = ga.Window(model.parameters())
    weigh(window, parts[:3])
    weigh(window, parts[3:])
    loss = window.settle()
    expected = gradients_of(model)
    model.zero_grad()

    window = ga.Window(model.parameters())
    weigh(window, parts[:3])
    torch.save(window.state_dict(), tmp_path / "state")
    model.zero_grad()
    window = ga.Window(model.parameters())
    window.load_state_dict(torch.load(tmp_path / "state"))
    assert window.micro_batches == 3
    weigh(window, parts[3:])
    assert window.settle().value.item() == loss.value.item()
    for name, gradient in gradients_of(model).items():
        assert gradient is not None
        assert torch.equal(gradient, expected[name])  # type: ignore[arg-type]


def test_a_state_of_another_version() -> None:
    window = ga.Window(nn.Linear(2, 1).parameters())
    state = window.state_dict()
    with pytest.raises(ga.StateError, match="of a Window is of version 2"):
        window.load_state_dict({**state, "version": 2})
    del state["sums"]
    with pytest.raises(ga.StateError, match="of a Window has no sums"):
        window.load_state_dict(state)


def test_a_state_of_other_parameters() -> None:
    window, other = ga.Window(model_of()), ga.Window(nn.Linear(5, 4))
    window.weigh(torch.zeros((), dtype=torch.double, requires_grad=True) * 1, over=1).backward()
    with pytest.raises(ga.StateError, match="gradients of 4 parameters, and they are not those of this window's 2"):
        other.load_state_dict(window.state_dict())


# ------------------------------------------------------------------------------------------------------- over processes
SHARES = {0: [3, 1], 1: [5, 2, 2]}


def over_ranks(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("plain", "DDP", "DDP by parameters", "the same everywhere"):
        model = model_of()
        wrapped = DistributedDataParallel(model) if kind.startswith("DDP") else model
        window = ga.Window(wrapped if kind == "DDP" else model.parameters())
        windows = []
        for seed in (0, 1):
            x, labels = tokens(seed=seed)
            sizes = SHARES[0 if kind == "the same everywhere" else rank]
            start = 0 if kind == "the same everywhere" or rank == 0 else sum(SHARES[0])
            end = start
            for number, size in enumerate(sizes):
                at = slice(end, end + size)
                end += size
                wait = wrapped.no_sync() if kind.startswith("DDP") and number < len(sizes) - 1 else torch.enable_grad()
                with wait:  # type: ignore[attr-defined]
                    (window.weigh(loss_of(wrapped, x[at], labels[at])) / len(sizes)).backward()
            loss = window.settle()
            windows.append((gradients_of(model), loss.value.item(), loss.weight))
            model.zero_grad()
        found[kind] = windows
    return found


def test_over_two_processes() -> None:
    for result in results_of(over_ranks, 2):
        for kind, windows in result.items():
            for seed, (gradients, value, weight) in enumerate(windows):
                x, labels = tokens(seed=seed)
                rows = slice(0, sum(SHARES[0]) if kind == "the same everywhere" else 13)
                expected, expected_loss = whole(model_of(), x[rows], labels[rows])
                assert_same_gradients(gradients, expected, where=f"{kind}, window {seed}: ")
                assert abs(value - expected_loss) < EXACT, kind
                counted = int((labels[rows] != IGNORED).sum())
                assert weight == (2 * counted if kind == "the same everywhere" else counted), kind
