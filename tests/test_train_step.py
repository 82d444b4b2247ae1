"""The whole batch in hand, by name: nested batches, what is refused, what an error leaves behind."""

import copy
import dataclasses
import gc
import logging
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from oracle import assert_same_gradients, gradients_of, parameters_of
from pairs import ROWS, Pair, X, Y, assert_no_gradients, make_model, make_step, squares

# ------------------------------------------------------------------------------------------------------- nested batches

Named = namedtuple("Named", ["x", "y"])


@dataclasses.dataclass
class Plain:
    x: Tensor
    y: Tensor
    name: str = "batch"


# Every other nesting is tested with `gradaccum.tree`.
NESTINGS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Pair]]] = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "named tuple": (Named, lambda batch: (batch.x, batch.y)),
    "tensor": (lambda x, y: torch.cat([x, y], dim=1), lambda batch: (batch[:, :3], batch[:, 3:])),
    "deep": (
        lambda x, y: {"inputs": [(x, None)], "rest": Plain(Named(1.5, "text"), {"y": y}), "ids": ["a"] * len(x)},
        lambda batch: (batch["inputs"][0][0], batch["rest"].y["y"]),
    ),
    "not contiguous": (lambda x, y: (x.t().contiguous().t(), y.expand(-1, 2)[:, :1]), tuple),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_nested_batches(name: str) -> None:
    nested, read = NESTINGS[name]
    batch = nested(X, Y)
    seen: list[Any] = []

    def loss_fn(model: nn.Module, micro_batch: Any) -> Tensor:
        seen.append(micro_batch)
        return squares(model, read(micro_batch))

    model, _, train_step = make_step(loss_fn)
    train_step.backward(batch)
    whole = make_model()
    squares(whole, (X, Y)).backward()
    assert_same_gradients(gradients_of(model), gradients_of(whole))
    assert {type(micro_batch) for micro_batch in seen} == {type(batch)}
    assert [len(read(micro_batch)[0]) for micro_batch in seen] == [4, 3, 3, 3], "as equal as can be"
    assert torch.equal(torch.cat([read(micro_batch)[0] for micro_batch in seen]), X), "every row once, in order"
    if name == "deep":
        assert [len(micro_batch["ids"]) for micro_batch in seen] == [4, 3, 3, 3]
        assert seen[0]["rest"].x == Named(1.5, "text")


# ---------------------------------------------------------------------------------------------------- bad input, errors

BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "rows disagree": ((X, Y[:5]), r"Rows disagree: batch\[0\] has 13 and batch\[1\] has 5 \(shape \(5, 1\)\)"),
    "no rows": ((X[:0], Y[:0]), r"The batch has 0 rows.*0 / 0.*Leave empty batches out"),
    "no tensors": ({"n": 3}, r"holds no tensor with a first dimension"),
    "nothing": (None, r"\(NoneType\) holds no tensor with a first dimension"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_that_cannot_be_cut(name: str) -> None:
    batch, message = BAD_BATCHES[name]
    model, _, train_step = make_step()
    for call in (train_step, train_step.backward):
        with pytest.raises(ga.BatchError, match=message):
            call(batch)
    assert_no_gradients(model)
    assert train_step((X, Y)).index == 1


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "auto "])
def test_sizes_that_are_none_and_a_loss_that_is_no_function(size: Any) -> None:
    with pytest.raises(ga.WindowError, match=r"micro_batch_size=.*at least 1"):
        make_step(micro_batch_size=size)
    with pytest.raises(ga.GradAccumError, match=r"loss_fn is a Tensor.*loss_fn\(model, micro_batch\)"):
        make_step(torch.ones(()))


def test_a_plain_mean_that_was_not_over_samples() -> None:
    def loss_fn(model: nn.Module, batch: Pair) -> Tensor:
        output, counts = model(batch[0]), batch[1] > 0
        return (output * counts).sum() / counts.sum()

    model, _, train_step = make_step(loss_fn)
    y = torch.ones(ROWS, 1, dtype=torch.float64)
    y[4:6] = -1
    message = (
        r"does not add up: it is .* for 4 samples together.*what it was divided by, which nothing in the batch gives"
    )
    for call in (train_step, train_step.backward):
        with pytest.raises(ga.MeanError, match=f"(?s){message}"):
            call((X, y))
    assert_no_gradients(model)


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_a_batch_leaves_nothing_behind(at: int, error: type[BaseException]) -> None:
    calls = iter(range(99))

    def loss_fn(model: nn.Module, batch: Pair) -> Tensor:
        if next(calls) == at:
            raise error("mine")
        return squares(model, batch)

    model, _, train_step = make_step(loss_fn, check="off")
    with pytest.raises(error, match="mine"):
        train_step((X, Y))
    assert_no_gradients(model)
    assert train_step.state_dict() == {"updates": 0, "micro_batches": 0, "samples": 0, "version": 1}
    assert train_step((X, Y)).index == 1


def test_an_optimizer_that_fails_leaves_nothing_behind() -> None:
    model, optimizer, train_step = make_step()
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_step((X, Y))
    handle.remove()
    assert_no_gradients(model)
    assert train_step((X, Y)).index == 1


# ---------------------------------------------------------------------------------------------------- what else it does
def test_weights_are_counted_once_for_the_batch_and_once_for_each_micro_batch() -> None:
    seen: list[int] = []

    def weights(batch: Pair) -> int:
        seen.append(len(batch[0]))
        return len(batch[0])

    _, _, train_step = make_step(weights=weights)
    train_step((X, Y))
    assert seen == [13, 4, 3, 3, 3]


def test_one_graph_is_alive_at_a_time() -> None:
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []

    def loss_fn(model: nn.Module, batch: Pair) -> Tensor:
        gc.collect()
        alive.append(sum(output() is not None for output in outputs))
        output = model(batch[0])
        outputs.append(weakref.ref(output))
        return F.mse_loss(output, batch[1])

    _, _, train_step = make_step(loss_fn)
    update = train_step((X, Y))
    assert alive == [0, 0, 0, 0]
    assert not update.loss.requires_grad


def test_several_models_are_handed_to_the_loss_as_they_were_given() -> None:
    models = (make_model(), make_model())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    seen: list[Any] = []

    def loss_fn(given: Any, batch: Pair) -> Tensor:
        seen.append(given)
        return squares(given[0], batch) + squares(given[1], batch)

    ga.TrainStep(models, optimizers, loss_fn, micro_batch_size=4)((X, Y))
    assert all(given is models for given in seen)
    assert_same_gradients(parameters_of(models[0]), parameters_of(models[1]), tolerance=0.0)


def test_the_plan_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _, _, train_step = make_step()
    with caplog.at_level(logging.INFO, "gradaccum"):
        train_step((X, Y))
        train_step((X, Y))
    line = "batch 13 = 4 micro-batches of 3 to 4 | exact (checked on 3 + 1 samples)"
    assert [record.message for record in caplog.records] == [line]


def test_a_state_is_counted_on_from_with_another_size() -> None:
    _, _, train_step = make_step(micro_batch_size=4)
    train_step((X, Y))
    _, _, resumed = make_step(micro_batch_size=13)
    resumed.load_state_dict(copy.deepcopy(train_step.state_dict()))
    assert resumed((X, Y)).index == 2
    assert resumed.state_dict() == {"updates": 2, "micro_batches": 5, "samples": 26, "version": 1}
    with pytest.raises(ga.StateError, match=r"no count of updates"):
        resumed.load_state_dict({})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "is of version 2, and this version of gradaccum reads up to 1"),
        ({"version": "1.0"}, "is of version '1.0'"),
        ({"sizes": {"best": 4}}, "the search for a micro-batch size has no fastest, caps, searched_rows; .*holds best"),
        ({"sizes": None}, "it is a NoneType that holds nothing"),
        ({"draws": {"seed": 1}}, "the draws by sample has no steps_by_hand"),
    ],
)
def test_a_state_of_another_version_is_named_and_nothing_of_it_loaded(changed: dict[str, Any], message: str) -> None:
    _, _, before = make_step(micro_batch_size="auto", randomness="sample")
    before((X, Y))
    _, _, step = make_step(micro_batch_size="auto", randomness="sample")
    with pytest.raises(ga.StateError, match=message):
        step.load_state_dict({**before.state_dict(), **changed})
    assert step.updates == 0
    step.load_state_dict(before.state_dict())
    assert step.updates == 1


@pytest.mark.parametrize("call", ["update", "backward"])
def test_a_step_in_its_own_loss_is_told(call: str) -> None:
    model = nn.Linear(3, 1)
    batch = torch.randn(8, 3)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if step.micro_batches == 0 and is_nested:
            (step if call == "update" else step.backward)(batch)
        return model(x).square().mean()

    is_nested = True
    step = ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=4)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ga.MisuseError, match=r"called at .*test_train_step.py:\d+ while it runs another batch"):
        step(batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))
    is_nested = False
    assert step(batch).index == 1
