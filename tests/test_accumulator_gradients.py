"""Gradients that the user's own code leaves, changes or looks at, and those of models that are somebody else's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga

# An error in the loop's body is on its way when Python lets go of the loop, and then its half window is warned of too.
pytestmark = pytest.mark.filterwarnings("ignore::gradaccum.DiscardedWindowWarning")


def micro_batches(count: int) -> list[Tensor]:
    return [torch.randn(2, 3) for _ in range(count)]


def accumulator_of(model: nn.Module, **options: Any) -> ga.Accumulator:
    return ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"micro_batches": 2, **options})


def train(
    accumulator: ga.Accumulator,
    stream: list[Any],
    loss: Callable[[Any], Any],
    *,
    after: Callable[[int], object] = lambda done: None,
) -> None:
    """One pass; ``after(n)`` runs in the loop's body when the n-th micro-batch is done."""
    for done, micro_batch in enumerate(accumulator.over(stream), start=1):
        accumulator.backward(loss(micro_batch))
        after(done)


def test_leftover_gradients_are_refused_by_name() -> None:
    model = nn.Linear(3, 1)
    accumulator = accumulator_of(model)
    model(torch.ones(1, 3)).sum().backward()
    message = r"2 of 2 parameters have a \.grad before .* first micro-batch \(weight, bias\).*zero_grad"
    with pytest.raises(ga.MisuseError, match=message):
        train(accumulator, micro_batches(2), lambda x: model(x).mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step = ga.TrainStep(model, optimizer, lambda model, x: model(x).mean(), micro_batch_size=2)
    with pytest.raises(ga.MisuseError, match=message):
        train_step(torch.ones(4, 3))
    optimizer.zero_grad()
    train(accumulator, micro_batches(2), lambda x: model(x).mean())
    assert train_step(torch.ones(4, 3)).index == 1


@pytest.mark.parametrize("sparse", [False, True])
def test_leftover_gradients_of_zero_are_no_leftovers(sparse: bool) -> None:
    model = nn.Embedding(5, 1, sparse=sparse)
    (0 * model(torch.tensor([1, 2])).sum()).backward()
    accumulator = accumulator_of(model)
    train(accumulator, [torch.tensor([1]), torch.tensor([3])], lambda x: model(x).mean())
    assert accumulator.updates == 1


def test_a_backward_by_hand_between_two_windows_is_a_leftover() -> None:
    model = nn.Linear(3, 1)
    accumulator = accumulator_of(model)

    def touch(done: int) -> None:
        if done == 2:
            backward_by_hand(model)

    with pytest.raises(ga.MisuseError, match=r"have a \.grad before the window's first micro-batch"):
        train(accumulator, micro_batches(4), lambda x: model(x).mean(), after=touch)
    assert accumulator.updates == 1


def backward_by_hand(model: nn.Module) -> None:
    model(torch.ones(1, 3)).sum().backward()


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "clip": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clear": lambda model: model.zero_grad(),
    "zero": lambda model: model.zero_grad(set_to_none=False),
    "backward": backward_by_hand,
    "replace": lambda model: setattr(model.weight, "grad", model.weight.grad * 0.5),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
@pytest.mark.parametrize("at", [1, 3])
def test_gradients_changed_by_hand_inside_a_window_are_noticed(touch: Callable[[Any], Any], at: int) -> None:
    model = nn.Linear(3, 1)
    accumulator = accumulator_of(model, micro_batches=4)
    message = r"gradient of 'weight' was (changed|cleared).* between two micro-batches of one window.*pass clip_norm="
    with pytest.raises(ga.MisuseError, match=message):
        train(accumulator, micro_batches(4), lambda x: model(x).mean(), after=lambda done: done == at and touch(model))
    assert model.weight.grad is None, "the window was discarded"
    assert accumulator.updates == 0


def test_gradients_may_be_looked_at_inside_a_window() -> None:
    model, norms = nn.Linear(3, 1), list[float]()
    accumulator = accumulator_of(model, micro_batches=3)

    def look(done: int) -> None:
        norms.append(model.weight.grad.norm().item() if done < 3 else 1.0)

    train(accumulator, micro_batches(3), lambda x: model(x).mean(), after=look)
    assert accumulator.updates == 1
    assert min(norms) > 0


def test_a_backward_twice_through_one_graph_is_torchs_error_and_discards_the_window() -> None:
    model = nn.Linear(3, 1)
    accumulator = accumulator_of(model, micro_batches=3)
    loss = model(torch.ones(2, 3)).pow(2).mean()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        train(accumulator, micro_batches(3), lambda x: loss)
    assert model.weight.grad is None
    assert accumulator.updates == 0


class Judge(nn.Module):
    """A discriminator, perhaps checkpointed."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("uses", ["1111", "0111", "1010", "0101"])
def test_only_the_own_models_get_gradients(use_reentrant: bool | None, uses: str) -> None:
    generator, judge = nn.Linear(3, 3), Judge(use_reentrant)
    accumulator = accumulator_of(generator)
    for is_used, x in zip(uses, accumulator.over(micro_batches(4)), strict=True):
        output = generator(x)
        value = judge(output).mean() if is_used == "1" else output.mean()
        accumulator.backward(ga.Loss.mean(value, over=2))
        assert judge.layer.weight.grad is None
    assert accumulator.updates == 2


def test_a_frozen_layer_before_another_model() -> None:
    generator, judge = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)), Judge()
    accumulator = accumulator_of(generator)
    train(accumulator, micro_batches(2), lambda x: judge(generator(x)).mean())
    assert accumulator.updates == 1
    assert judge.layer.weight.grad is None


def test_other_models_behind_a_reentrant_checkpoint_are_refused() -> None:
    generator, judge = nn.Linear(3, 3), Judge(use_reentrant=True)
    accumulator = accumulator_of(generator)
    with pytest.raises(ga.UnsupportedError, match=r"reentrant checkpoint.*use_reentrant=False"):
        train(accumulator, micro_batches(2), lambda x: judge(generator(x)).mean())
    assert judge.layer.weight.grad is None


def test_a_size_that_comes_again_after_the_window_turned_out_larger() -> None:
    """Three micro-batches like the first were expected; what the first was seeded with is not right for the third."""

    def loss(x: Tensor) -> Any:
        mean = model(x).pow(2).mean()
        return ga.Loss.mean(mean, over=len(x)) if len(x) == 53 else mean

    model = nn.Linear(3, 1, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    stream = [torch.randn(rows, 3, dtype=torch.float64) for rows in (2, 53, 2)]
    train(accumulator_of(model, micro_batches=3), stream, loss)
    made = {name: (start[name] - value) / 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    model(torch.cat(stream)).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_a_carried_window_may_go_on_through_another_model() -> None:
    """By then the micro-batches of several windows were alike, and nothing was asked about them any more."""
    generator, judge = nn.Linear(3, 3), Judge(use_reentrant=None)
    accumulator = accumulator_of(generator, micro_batches=3, tail="carry")
    train(accumulator, micro_batches(8), lambda x: generator(x).mean())
    train(accumulator, micro_batches(1), lambda x: ga.Loss.mean(judge(generator(x)).mean(), over=len(x)))
    assert accumulator.updates == 3
    assert judge.layer.weight.grad is None
