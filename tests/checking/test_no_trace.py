"""A look leaves nothing behind: after it everything is bit by bit what it was, and training goes on as without it."""

import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.checking.no_trace import StepsInside, no_trace

ROWS, FEATURES = 16, 4


class Busy(nn.Module):
    """All that a forward may change: buffers, attributes, a queue, a frozen twin, generators, a mode."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        self.twin = nn.Linear(FEATURES, 2).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(2))
        self.queue = torch.zeros(3, FEATURES)
        self.seen: list[int] = []
        self.calls = 0
        self.generator = torch.Generator().manual_seed(3)
        self.noise = np.random.default_rng(5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.last = x
        with torch.no_grad():
            self.twin.weight.mul_(0.9).add_(0.1)
            self.twin.bias.data = self.twin.bias.data + 1
            self.centre.add_(x.mean())
            self.queue[self.calls % 3] = x[0]
        noise = torch.rand(len(x), 1, generator=self.generator) + random.random() + np.random.rand()
        return self.body(x) + self.twin(x) + self.centre + noise * float(self.noise.random())


class Hook:
    """A hook that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


class Scene:
    """A model, a network that only the loss knows, and everything that counts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Busy()
        self.judge = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        self.judge(torch.randn(4, 2)).sum().backward()
        self.hook, self.on_parameter, self.calls = Hook(), Hook(), [0]
        self.model.body[0].register_forward_hook(self.hook)
        next(self.model.body.parameters()).register_hook(self.on_parameter)
        self.numbers = itertools.count()
        rounds = 0

        def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal rounds
            rounds += 1
            self.calls[0] += 1
            next(self.numbers)
            self.judge.train(rounds % 2 == 0)
            self.judge[0].requires_grad_(False)
            return F.mse_loss(model(batch[0]), batch[1]) + self.judge(model(batch[0])).mean()

        self.loss_fn = loss_fn
        self.rounds = lambda: rounds

    def state(self) -> dict[str, Any]:
        model, judge = self.model, self.judge
        tensors = {**model.state_dict(), **{f"judge.{name}": value for name, value in judge.state_dict().items()}}
        return {
            **{name: value.clone() for name, value in tensors.items()},
            "queue": model.queue.clone(),
            "gradients": [
                None if p.grad is None else p.grad.clone() for p in (*model.parameters(), *judge.parameters())
            ],
            "requires": [p.requires_grad for p in judge.parameters()],
            "modes": [module.training for module in (*model.modules(), *judge.modules())],
            "attributes": (sorted(vars(model)), list(model.seen), model.calls),
            "counts": (self.hook.calls, self.on_parameter.calls, self.calls[0], self.rounds()),
            "random": (torch.get_rng_state(), model.generator.get_state()),
            "outside": (
                random.getstate(),
                np.random.get_state(legacy=False)["state"]["key"].tolist(),
                model.noise.bit_generator.state,
            ),
        }


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, FEATURES, generator=generator), torch.randn(ROWS, 2, generator=generator)


def test_after_a_run_everything_is_as_it_was() -> None:
    scene = Scene()
    before = scene.state()
    identities = [id(parameter) for parameter in scene.model.parameters()], id(scene.model.queue)
    pointers = [parameter.data_ptr() for parameter in scene.model.parameters()]
    with no_trace([scene.model], [scene.loss_fn]) as watched:
        scene.loss_fn(scene.model, make_batch()).backward()
        assert scene.model.calls == 2  # it did run
        assert "judge.1" in watched.names.values()
        assert {name for _, name in watched.changed()} >= {"centre", "queue", "weight", "bias", "running_mean"}
    assert_equal(scene.state(), before)
    assert identities == ([id(parameter) for parameter in scene.model.parameters()], id(scene.model.queue))
    assert pointers == [parameter.data_ptr() for parameter in scene.model.parameters()]


@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [4, "auto"])
def test_the_first_update_is_bit_by_bit_the_one_without_a_look(size: Any, backward: bool) -> None:
    states = []
    for check in ("off", "first"):
        scene = Scene()
        optimizer = torch.optim.Adam(scene.model.parameters(), lr=0.1)
        step = ga.TrainStep(scene.model, optimizer, scene.loss_fn, micro_batch_size=size, check=check)  # type: ignore[arg-type]
        if size == "auto":
            step._run.fitting._search.fastest = 4 * FEATURES  # type: ignore[union-attr]
            step._run.fitting._search._is_by_time = False  # type: ignore[union-attr]
        if backward:
            step.backward(make_batch())
        else:
            step(make_batch())
        state = scene.state()
        state["optimizer"] = [list(of_one.values()) for of_one in optimizer.state.values()]
        state["counted"] = step.state_dict()["samples"]
        states.append(state)
    assert_equal(states[1], states[0])


@pytest.mark.filterwarnings("ignore::gradaccum.GradAccumWarning")
@pytest.mark.parametrize("size", [4, "auto"])
def test_scaler_autocast_and_optimizer_are_bit_by_bit_those_without_a_look(size: Any) -> None:
    states = []
    for check in ("off", "first"):
        scene = Scene()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        optimizer = torch.optim.AdamW(scene.model.parameters(), lr=0.1)

        def loss_fn(model: nn.Module, batch: Any, scene: Scene = scene) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return scene.loss_fn(model, batch).float()

        step = ga.TrainStep(
            scene.model,
            optimizer,
            loss_fn,
            micro_batch_size=size,
            scaler=scaler,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            check=check,  # type: ignore[arg-type]
        )
        if size == "auto":
            step._run.fitting._search.fastest = 4 * FEATURES  # type: ignore[union-attr]
            step._run.fitting._search._is_by_time = False  # type: ignore[union-attr]
        for _ in range(3):
            step(make_batch())
        state = scene.state()
        state["optimizer"] = [list(of_one.values()) for of_one in optimizer.state.values()]
        state["rate"] = optimizer.param_groups[0]["lr"]
        state["scaler"] = scaler.state_dict()
        states.append(state)
    assert_equal(states[1], states[0])
    assert states[0]["scaler"]["scale"] == 16.0  # it did grow, and by the updates alone


def test_a_network_that_is_found_when_it_is_called() -> None:
    class Hidden:
        """Out of reach of what functions hold."""

        __slots__ = ("network",)

    hidden = Hidden()
    hidden.network = nn.BatchNorm1d(FEATURES)  # type: ignore[attr-defined]
    hidden.network.weight.grad = given = torch.ones(FEATURES)  # type: ignore[attr-defined]
    with no_trace([], []) as watched:
        hidden.network(torch.randn(5, FEATURES)).square().sum().backward()  # type: ignore[attr-defined]
        assert "BatchNorm1d" in watched.names.values()
    assert hidden.network.num_batches_tracked == 0  # type: ignore[attr-defined]
    assert torch.equal(hidden.network.running_mean, torch.zeros(FEATURES))  # type: ignore[attr-defined]
    assert hidden.network.weight.grad is given  # type: ignore[attr-defined]
    assert torch.equal(given, torch.ones(FEATURES))


def test_an_error_inside_leaves_nothing_either() -> None:
    scene = Scene()
    before = scene.state()
    scene.model.body[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), no_trace([scene.model], [scene.loss_fn]):
        scene.loss_fn(scene.model, make_batch())
    assert_equal(scene.state(), before)


@pytest.mark.parametrize("call", [lambda step: step(make_batch()), lambda step: step.backward(make_batch())])
def test_an_optimizer_that_steps_in_the_loss_is_not_run_for_a_look(call: Callable[[Any], Any]) -> None:
    critic, model = nn.Linear(2, 1), nn.Linear(FEATURES, 2)
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.1)
    steps = Hook()
    of_critic.register_step_post_hook(steps)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        critic(model(batch[0]).detach()).mean().backward()
        of_critic.step()
        of_critic.zero_grad()
        return critic(model(batch[0])).mean()

    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=4)
    with pytest.raises(ga.MisuseError, match="the other model's optimizer has stepped"):
        call(step)
    assert step._accumulation.plan_line.evidence.startswith("not checked: 4 samples at once raise StepsInside")
    assert steps.calls == 2  # those of training's own micro-batches


def test_steps_inside_are_refused_before_they_are_made() -> None:
    model = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weight = model.weight.detach().clone()
    model(torch.randn(3, FEATURES)).sum().backward()
    with pytest.raises(StepsInside, match="SGD steps inside of it"), no_trace([], []):
        optimizer.step()
    assert torch.equal(model.weight, weight)


def test_names_of_running_code_are_left_alone() -> None:
    """A function may hold a namespace, and with it all that Python itself has: emptied, nothing would run."""
    names: dict[str, Any] = {}
    exec("import sys\ncount = 0\ndef loss_of(model, batch): return model(batch[0]).square().mean()", names)
    loaded = len(sys.modules)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return names["loss_of"](model, batch)

    model = nn.Linear(FEATURES, 2)
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=4)
    step(make_batch())
    assert len(names["__builtins__"]) > 100
    assert len(sys.modules) >= loaded
