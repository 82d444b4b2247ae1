"""Watches that speak up, name the line that was wrong, and leave every object as it was."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR, StepLR

import gradaccum as ga
from gradaccum.window import guards
from gradaccum.window.parameters import as_sequence, check_parameters, named_parameters, refuse_data_parallel
from gradaccum.window.plan_line import coupled_batch_norms, warn_of_batch_norms
from pairs import line_here


# ------------------------------------------------------------------------------------------------ models and optimizers
def test_one_or_many() -> None:
    model = nn.Linear(1, 1)
    assert as_sequence(model, nn.Module, name="model") == [model]
    assert as_sequence((model, model), nn.Module, name="model") == [model, model]
    layers = nn.ModuleList([model])
    assert as_sequence(layers, nn.Module, name="model") == [layers], "a ModuleList is one module"


@pytest.mark.parametrize(
    ("given", "described"),
    [
        (None, "a NoneType"),
        ("model", "a str"),
        (nn.Linear, "a type"),
        ([], "a list of nothing"),
        ((), "a tuple of nothing"),
        ([nn.Linear(1, 1), 3], "a list of Linear, int"),
        (nn.Linear(1, 1).parameters(), "a generator"),
        ({"a": nn.Linear(1, 1)}, "a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_model(given: Any, described: str) -> None:
    with pytest.raises(
        ga.ParameterError, match=rf"model must be a torch Module or a non-empty sequence .*, and is {described}\."
    ):
        as_sequence(given, nn.Module, name="model")


def test_parameters_by_name() -> None:
    def names(*models: nn.Module) -> list[str]:
        return [name for name, _ in named_parameters(models)]

    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert names(one) == ["weight", "bias"]
    assert names(one, two) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    two.weight = one.weight
    assert names(one, two) == ["0.weight", "0.bias", "1.bias"], "a shared one once"


def check(models: list[nn.Module], optimizers: list[Optimizer]) -> None:
    check_parameters(named_parameters(models), optimizers)


def test_what_belongs_together() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    check([one], [SGD(one.parameters())])
    check([one, two], [SGD([*one.parameters(), *two.parameters()])])
    check([one, two], [SGD(one.parameters()), SGD(two.parameters())])
    check([one], [SGD([one.weight])])  # a part of it
    one.weight.requires_grad_(False)
    check([one], [SGD(one.parameters())])  # partly frozen


def test_a_parameter_that_is_not_the_models() -> None:
    model, other = nn.Linear(2, 3), nn.Linear(5, 7)
    optimizer = Adam([{"params": model.parameters()}, {"params": [other.weight]}])
    message = r"group 1 of Adam holds a parameter of shape \(7, 5\) that is none of the model's 2\..*model=\[first, sec"
    with pytest.raises(ga.ParameterError, match=message):
        check([model], [optimizer])


# --------------------------------------------------------------------------------------------------- what wraps a model
def test_a_distributed_model_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        for models in ([model], [nn.Linear(2, 2), nn.Sequential(model)]):
            with pytest.raises(ga.UnsupportedError, match=r"wrapped in DistributedDataParallel.*the plain module"):
                refuse_data_parallel(models)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "FSDPLinear", "FSDPTransformer"])
def test_a_sharded_model_is_refused_and_a_plain_one_passes(name: str) -> None:
    refuse_data_parallel([nn.Sequential(nn.Linear(2, 2)), nn.DataParallel(nn.Linear(2, 2))])
    with pytest.raises(ga.UnsupportedError, match=f"wrapped in {name}"):
        refuse_data_parallel([type(name, (nn.Linear,), {})(2, 2)])


# ------------------------------------------------------------------------------------------------------------ BatchNorm
def test_layers_that_see_the_micro_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.SyncBatchNorm(2)), nn.LayerNorm(2),
                          nn.GroupNorm(1, 2), nn.InstanceNorm1d(2))  # fmt: skip
    assert coupled_batch_norms([model]) == ["1", "2.0"]
    model[1].eval()
    assert coupled_batch_norms([model]) == ["2.0"]
    assert coupled_batch_norms([model.eval()]) == []
    # Without running statistics in evaluation mode, too.
    assert coupled_batch_norms([nn.BatchNorm2d(2, track_running_stats=False).eval()]) == ["BatchNorm2d"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["a"], r"1 BatchNorm layer in training mode \(a\)"), (["a", "b", "c"], r"3 BatchNorm layers .* \(a, b, c\)"),
     (["a", "b", "c", "d", "e"], r"5 BatchNorm layers in training mode \(a, b, c and 2 more\)")],
)  # fmt: skip
def test_the_warning_names_them(names: list[str], shown: str) -> None:
    with pytest.warns(
        ga.BatchNormWarning, match=f"{shown} will normalise each of the 4 micro-batches.*4 times an update"
    ) as seen:
        warn_of_batch_norms(names, micro_batches=4)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("by_hand", [False, True], ids=["TrainStep", "Accumulator"])
def test_the_warning_points_at_the_users_line(by_hand: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda model, x: model(x).mean(), micro_batch_size=2)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2)

    step(torch.randn(2, 2))  # in one piece it is exact, and not warned of

    def train() -> None:
        if not by_hand:
            step(torch.randn(4, 2))
            return
        for x in accumulator.over([torch.randn(2, 2)] * 2):
            accumulator.backward(model(x).mean())

    with pytest.warns(ga.BatchNormWarning, match=r"1 BatchNorm layer in training mode \(1\)") as seen:
        train()
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()  # once


# ------------------------------------------------------------------------------------------------------------- the line
def test_the_line_is_the_users() -> None:
    assert guards.user_line() == line_here()
    assert [guards.user_line() for _ in range(2)] == [line_here()] * 2


def test_the_line_is_not_torchs() -> None:
    seen: list[str] = []
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: seen.append(guards.user_line()))
    model(torch.ones(1, 1)), seen.append(line_here())
    assert seen[0].startswith(__file__)


# -------------------------------------------------------------------------------------------------------- calls by hand
class Watched:
    """An optimizer, its scheduler, and a window that is open or not."""

    def __init__(
        self, make_scheduler: Callable[[Optimizer], LRScheduler] = lambda optimizer: StepLR(optimizer, 1)
    ) -> None:
        self.model = nn.Linear(1, 1)
        self.optimizer = SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.scheduler = make_scheduler(self.optimizer)
        self.open, self.ours = 3, False

    def watch(self) -> AbstractContextManager[None]:
        return guards.no_calls_by_hand(
            [self.optimizer], [self.scheduler], open_micro_batches=lambda: self.open, is_ours=lambda: self.ours
        )

    def calls(self) -> dict[str, Callable[[], Any]]:
        return {
            "optimizer.step": self.optimizer.step,
            "optimizer.zero_grad": self.optimizer.zero_grad,
            "scheduler.step": self.scheduler.step,
        }

    def look(self) -> tuple[Any, ...]:
        """All that could have been left behind."""
        return (
            type(self.optimizer), type(self.scheduler), set(vars(self.optimizer)), set(vars(self.scheduler)),
            dict(self.optimizer._optimizer_step_pre_hooks), dict(self.optimizer._optimizer_step_post_hooks),
        )  # fmt: skip


@pytest.mark.parametrize("fails", [False, True], ids=["", "an error"])
def test_the_objects_are_left_as_they_were(fails: bool) -> None:
    watched = Watched()
    before = watched.look()
    try:
        with watched.watch():
            assert isinstance(watched.optimizer, SGD)
            if fails:
                raise RuntimeError("in the loop")
    except RuntimeError:
        assert fails
    assert watched.look() == before


@pytest.mark.parametrize("name", ["optimizer.zero_grad", "scheduler.step"])
def test_a_method_that_somebody_wrapped_meanwhile_stays_theirs(name: str) -> None:
    watched = Watched()
    watched.optimizer.step()
    owner, method = (watched.optimizer, "zero_grad") if "optimizer" in name else (watched.scheduler, "step")
    calls: list[str] = []
    with watched.watch():
        inner = getattr(owner, method)
        setattr(owner, method, lambda: (calls.append("theirs"), inner()))
        with pytest.raises(ga.MisuseError, match=f"{name.replace('.', '[.]')}.. was called at"):
            getattr(owner, method)()
    getattr(owner, method)()
    assert calls == ["theirs", "theirs"], "and what they wrapped refuses nothing any more"


@pytest.mark.parametrize("is_sequence", [False, True])
def test_checkpoints_can_be_saved_while_watched(is_sequence: bool) -> None:
    watched = Watched(lambda one: SequentialLR(one, [StepLR(one, 1)] * 2, [3]) if is_sequence else StepLR(one, 1))
    plain_keys = set(watched.scheduler.state_dict())
    with watched.watch():
        state = watched.scheduler.state_dict()
        assert set(state) == plain_keys
        torch.save({"optimizer": watched.optimizer.state_dict(), "scheduler": state}, io.BytesIO())
        copy.deepcopy(watched.optimizer)
        again = pickle.loads(pickle.dumps(watched.optimizer))
    assert type(again) is SGD
    again.zero_grad()


def test_an_object_whose_class_cannot_be_changed() -> None:
    class Slotted:
        __slots__ = ("calls",)

        def __init__(self) -> None:
            self.calls = 0

        def step(self) -> None:
            self.calls += 1

    scheduler, optimizer = Slotted(), SGD(nn.Linear(1, 1).parameters())
    with guards.no_calls_by_hand([optimizer], [scheduler], open_micro_batches=lambda: 1, is_ours=lambda: True):
        scheduler.step()
    assert scheduler.calls == 1
