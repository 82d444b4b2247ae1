"""Options that there are not, arguments too many, values of another type: each error names what to type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradaccum as ga
from gradaccum.window.option_names import OTHER_NAMES, explains_arguments

X, Y = torch.randn(8, 4), torch.randint(3, (8,))


def loss_fn(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0]), batch[1])


def accumulator(*args: Any, **options: Any) -> Any:
    model = nn.Linear(4, 3)
    return ga.Accumulator(model, torch.optim.SGD(model.parameters()), *args, **options)


def train_step(*args: Any, **options: Any) -> Any:
    model = nn.Linear(4, 3)
    return ga.TrainStep(model, torch.optim.SGD(model.parameters()), loss_fn, *args, **options)


@pytest.mark.parametrize(
    ("make", "args", "options", "message"),
    [
        (accumulator, (4,), {}, r"takes model, optimizer by place, and there is one argument more, 4\. .*"
                                r"Write batch_size=4, a number of samples, or micro_batches=4, of the loader's items"),
        (accumulator, (), {"accum_iter": 4}, r"no option accum_iter=\. Write micro_batches=4, of .* or batch_size="),
        (accumulator, (), {"gradient_accumulation_steps": 4}, r"Write micro_batches=4"),
        (accumulator, (), {"micro_batches": 4, "max_norm": 1.0}, r"no option max_norm=\. Did you mean clip_norm=\?"),
        (accumulator, (), {"micro_batches": 4, "lr_scheduler": None}, r"Did you mean scheduler=\?"),
        (accumulator, (), {"micro_batch": 4}, r"no option micro_batch=\. Did you mean batch_size=\?"),
        (accumulator, (), {"microbatches": 4}, r"Did you mean micro_batches=\?"),
        (accumulator, (), {"xyz": 4}, r"no option xyz=\. It has model=, optimizer=, micro_batches=, "),
        (train_step, (8,), {}, r"there is one argument more, 8\. .*write micro_batch_size=8\."),
        (train_step, (), {"batch_size": 8}, r"no option batch_size=\. The batch is what each call is given"),
        (train_step, (), {"accum_steps": 8}, r"micro_batch_size= is how many of its samples one forward sees"),
        (train_step, (), {"criterion": 8}, r"Did you mean loss_fn=\?"),
    ],
)  # fmt: skip
def test_what_is_no_option(make: Callable[..., Any], args: Any, options: Any, message: str) -> None:
    with pytest.raises(ga.OptionError, match=f"(?s){message}") as raised:
        make(*args, **options)
    assert isinstance(raised.value, (TypeError, ValueError))
    assert raised.value.__cause__ is None


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(
        ga.OptionError, match=r"missing a required argument: 'optimizer'.*ga.Accumulator\(model, optimizer, "
    ):
        ga.Accumulator(nn.Linear(4, 3))


def test_a_batch_in_two_arguments() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ga.WindowError, match=r"tensor of shape \(8,\): .* Write audit\(model, loss_fn, \(x, y\)\)"):
        ga.audit(model, loss_fn, X, Y)
    with pytest.raises(ga.OptionError, match=r"one argument more, a tensor of shape \(8,\).* one argument: \(x, y\)"):
        ga.plan(model, loss_fn, X, Y)
    assert ga.audit(model, loss_fn, (X, Y), micro_batch_size=3).exact


@pytest.mark.parametrize("make", [accumulator, train_step])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("scaler", True, r"scaler=True is of type bool, .*GradScaler\(\"cuda\"\)"),
        ("clip_norm", "1", r"clip_norm='1' is of type str; .* clip_norm=1\.0"),
        ("clip_norm", True, r"clip_norm=True is of type bool"),
        ("progress", "yes", r"progress='yes' is of type str; it is an option to be True or False"),
        ("weights", 10, r"weights=10 is of type int; it is a function\. Pass weights=lambda batch: "),
        ("persistent_gradients", "no", r"persistent_gradients='no' is of type str"),
    ],
)
def test_values_of_another_type(make: Callable[..., Any], option: str, value: Any, message: str) -> None:
    size = {"micro_batches": 2} if make is accumulator else {}
    with pytest.raises(ga.OptionError, match=message):
        make(**size, **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lockstep", "no", r"lockstep='no' is of type str; it is an option to be True or False"),
        ("split", "x", r"split='x' is of type str, which cannot cut a batch\. Pass ga\.split_by_samples\(\)"),
    ],
)
def test_values_of_another_type_in_a_train_step(option: str, value: Any, message: str) -> None:
    with pytest.raises(ga.OptionError, match=message):
        train_step(**{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1}, {"clip_norm": float("inf")}, {"clip_norm": torch.tensor(1.0)},
        {"scaler": torch.amp.GradScaler("cpu", enabled=False)}, {"scaler": None}, {"progress": False},
    ],
)  # fmt: skip
def test_no_false_alarm(options: Any) -> None:
    assert train_step(**options)((X, Y)).samples == 8
    made = accumulator(**options, micro_batches=1)
    assert made.backward(loss_fn(made._accumulation.models[0], (X, Y)), samples=8).samples == 8


def test_a_loss_beside_what_is_none() -> None:
    for beside in ("logits", "accuracy"):

        def output(model: Any, batch: Any, beside: str = beside) -> Any:
            logits = model(batch[0])
            more = {"logits": logits, "accuracy": (logits.argmax(1) == batch[1]).float().mean()}
            return {"loss": F.cross_entropy(logits, batch[1]), beside: more[beside]}

        model = nn.Linear(4, 3)
        step = ga.TrainStep(model, torch.optim.SGD(model.parameters()), output, micro_batch_size=4)
        with pytest.raises(ga.LossError, match=rf"'{beside}' cannot be a loss.*return output\[\"loss\"\]"):
            step((X, Y))


def test_terms_of_which_one_is_called_loss() -> None:
    model = nn.Linear(4, 3)

    def terms(model: Any, batch: Any) -> Any:
        logits = model(batch[0])
        return {
            "loss": F.cross_entropy(logits, batch[1]),
            "size": ga.Loss.mean(logits.square().mean(), over=len(logits)),
        }

    optimizer = torch.optim.SGD(model.parameters())
    assert ga.TrainStep(model, optimizer, terms, micro_batch_size=3)((X, Y)).losses.keys() == {"loss", "size"}


def test_a_model_that_was_made_anew() -> None:
    made, other = accumulator(micro_batches=1), nn.Linear(4, 3)
    with pytest.raises(ga.LossError, match="or is it a model that was made anew after the one that was passed"):
        made.backward(loss_fn(other, (X, Y)), samples=8)


def test_other_names_are_of_options_that_there_are() -> None:
    import inspect

    options = {name for cls in (ga.Accumulator, ga.TrainStep) for name in inspect.signature(cls).parameters}
    assert {name for names in OTHER_NAMES.values() for name in names} <= options
    assert not OTHER_NAMES.keys() - {"batch_size"} & options


def test_what_fits_is_called_as_it_is() -> None:
    @explains_arguments("No {}.")
    def function(a: int, *, b: int = 2) -> tuple[int, int]:
        """What it does."""
        return a, b

    assert function(1, b=3) == (1, 3)
    assert function.__doc__ == "What it does."
    with pytest.raises(TypeError, match="inside"):
        explains_arguments("")(lambda: _raise())()


def _raise() -> None:
    raise TypeError("inside")
