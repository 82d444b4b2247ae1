"""A loss function that cannot be called as it will be is refused when the step is made, with the line to type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga


def make_step(loss_fn: Any) -> ga.TrainStep:
    model = nn.Linear(3, 2)
    return ga.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch_size=2)


def reversed_arguments(batch: Any, model: Any) -> Tensor:
    return model(batch).mean()


def batch_only(batch: Any) -> Tensor:
    return batch.mean()


class WithForward(nn.Module):
    def forward(self, model: Any, micro_batch: Any, extra: Any) -> Tensor:
        return model(micro_batch).mean() + extra


WRONG: dict[str, tuple[Any, str]] = {
    "a criterion": (
        nn.CrossEntropyLoss(),
        r"loss_fn is CrossEntropyLoss, which takes outputs and targets.*ga\.criterion",
    ),
    "a criterion's function": (F.cross_entropy, r"loss_fn is cross_entropy, which takes outputs and targets"),
    "a criterion of the library": (ga.criterion(nn.MSELoss()), r"which takes outputs and targets"),
    "the batch alone": (batch_only, r"called with two arguments, the model and a micro-batch, and batch_only\(batch"),
    "the other way round": (reversed_arguments, r"model first and the micro-batch second.*the\s+other way round"),
    "one argument more": (WithForward(), r"cannot be: missing a required argument: 'extra'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_function_of_another_kind(name: str) -> None:
    loss_fn, message = WRONG[name]
    with pytest.raises(ga.LossError, match=rf"(?s){message}.*def loss_fn\(model, micro_batch\)"):
        make_step(loss_fn)


class Callable2:
    def __call__(self, net: Any, batch: Any, *, scale: float = 1.0) -> Tensor:
        return scale * net(batch).mean()


def with_options(model: Any, micro_batch: Any, scale: float = 1.0) -> Tensor:
    return scale * model(micro_batch).mean()


RIGHT: list[Callable[..., Any]] = [
    lambda m, b: m(b).mean(), lambda *both: both[0](both[1]).mean(), with_options, Callable2(),
    lambda network, target: network(target).mean(), lambda inputs, model_batch=None: inputs(model_batch).mean(),
]  # fmt: skip


@pytest.mark.parametrize("loss_fn", RIGHT)
def test_what_can_be_called_is_not_refused(loss_fn: Callable[..., Any]) -> None:
    assert make_step(loss_fn)(torch.ones(4, 3)).index == 1


def test_what_the_message_says_to_type() -> None:
    criterion = ga.criterion(nn.CrossEntropyLoss())

    def loss_fn(model: Any, micro_batch: Any) -> ga.Loss:
        x, y = micro_batch
        return criterion(model(x), y)

    assert make_step(loss_fn)((torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))).weight == 4


@pytest.mark.parametrize("call", ["__call__", "backward"])
def test_a_batch_is_one_argument(call: str) -> None:
    step = make_step(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
    x, y = torch.ones(4, 3), torch.ones(4, 2)
    with pytest.raises(ga.MisuseError, match=r"A batch is one argument, and there are 2.*train_step\(\(x, y\)\)"):
        getattr(step, call)(x, y)
    getattr(step, call)((x, y))


class Output(dict[str, Any]):
    @property
    def loss(self) -> Any:
        return self["loss"]


RETURNED: list[tuple[Callable[[Tensor], Any], str]] = [
    (
        lambda loss: Output(loss=loss, logits=torch.ones(4, 2)),
        r"everything that the model returned.*return output\.loss",
    ),
    (lambda loss: (loss, torch.ones(4, 2)), r"The loss is a tuple of 2: Tensor, Tensor\. Which.*return output\.loss"),
    (lambda loss: [loss], r"The loss is a list of 1"),
]


@pytest.mark.parametrize(("wrap", "message"), RETURNED, ids=["ModelOutput", "tuple", "list"])
def test_more_than_the_loss_was_returned(wrap: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ga.LossError, match=message):
        make_step(lambda model, batch: wrap(model(batch).mean()))(torch.ones(4, 3))


def test_a_model_output_of_hugging_face() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    with pytest.raises(ga.LossError, match=r"CausalLMOutput, everything.*return output\.loss"):
        make_step(lambda model, batch: outputs.CausalLMOutput(loss=model(batch).mean(), logits=batch))(torch.ones(4, 3))
    make_step(lambda model, batch: outputs.CausalLMOutput(loss=model(batch).mean(), logits=batch).loss)(
        torch.ones(4, 3)
    )
