"""What cannot add up in SGD's momentum is refused: when it is made, or before the first backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.errors import LossError, ParameterError, UnsupportedError
from gradaccum.gradients.momentum import check_rest

ROWS, FEATURES, WORDS = 13, 6, 7
Batch = tuple[Tensor, Tensor]


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, WORDS))


def make_batch() -> Batch:
    return torch.randn(ROWS, FEATURES), torch.randint(WORDS, (ROWS,))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def rows(batch: Batch) -> int:
    return len(batch[0])


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no momentum": ({"momentum": 0.0}, ParameterError, "momentum=0 in parameter group 0"),
    "nesterov": ({"nesterov": True}, ParameterError, "nesterov=True"),
    "dampening": ({"dampening": 0.1}, ParameterError, r"dampening=0\.1"),
    "maximize": ({"maximize": True}, ParameterError, "maximize=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_need_the_gradient_itself(name: str) -> None:
    options, error, message = REFUSED[name]
    model = make()
    with pytest.raises(error, match=message):
        ga.TrainStep(model, sgd(model, **options), loss_fn, micro_batch_size=4, accumulate_into="momentum")


class OwnSGD(torch.optim.SGD):
    """A subclass may do anything in its step."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, OwnSGD])
def test_other_optimizers(kind: Any) -> None:
    model = make()
    with pytest.raises(ParameterError, match=f"with {kind.__name__}: only in torch.optim.SGD"):
        ga.TrainStep(model, kind(model.parameters()), loss_fn, micro_batch_size=4, accumulate_into="momentum")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_norm": 1.0}, UnsupportedError, r"clip_norm=1\.0: the norm"),
        ({"scaler": torch.amp.GradScaler("cpu")}, UnsupportedError, "a GradScaler: unscaling"),
        ({"accumulate_dtype": torch.float32}, ParameterError, r"accumulate_dtype=torch\.float32"),
        ({"micro_batch_size": "auto"}, UnsupportedError, 'micro_batch_size="auto": a batch that runs out'),
        ({"accumulate_into": "adam"}, ParameterError, "accumulate_into='adam'"),
    ],
)
def test_options_that_need_the_gradient_itself(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        ga.TrainStep(model, sgd(model), loss_fn, **({"micro_batch_size": 4, "accumulate_into": "momentum"} | options))


def test_complex_parameters() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    with pytest.raises(ParameterError, match="complex parameters in group 0"):
        ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, accumulate_into="momentum")


def test_graphs_that_are_kept_while_they_fit() -> None:
    model = make()
    with pytest.raises(UnsupportedError, match="kept_graphs=None"):
        ga.TrainStep(
            model,
            sgd(model),
            forward=lambda model, batch: model(batch),
            batch_loss=lambda outputs, batch: outputs.mean(),
            micro_batch_size=4,
            accumulate_into="momentum",
        )


def test_an_own_loop_without_weights_or_that_drops() -> None:
    model = make()
    with pytest.raises(LossError, match="without weights="):
        ga.Accumulator(model, sgd(model), micro_batches=4, accumulate_into="momentum")
    with pytest.raises(UnsupportedError, match='tail="drop"'):
        ga.Accumulator(model, sgd(model), micro_batches=4, weights=rows, tail="drop", accumulate_into="momentum")


def test_sparse_gradients_at_first_sight() -> None:
    model = nn.Embedding(WORDS, FEATURES, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    train_step = ga.TrainStep(
        model, optimizer, lambda model, ids: model(ids).mean(), micro_batch_size=4, accumulate_into="momentum"
    )
    with pytest.raises(UnsupportedError, match="a sparse gradient, of a parameter of shape"):
        train_step(torch.arange(WORDS))
    assert not optimizer.state


def test_a_total_that_is_not_known_ahead_is_refused_before_the_first_backward() -> None:
    model = make()
    optimizer = sgd(model)

    def loss_of(model: nn.Module, batch: Batch) -> Any:
        return ga.Loss.mean(loss_fn(model, batch), over=2 * rows(batch))

    train_step = ga.TrainStep(model, optimizer, loss_of, micro_batch_size=4, accumulate_into="momentum")
    with pytest.raises(LossError, match="is over 8, in a micro-batch of 4 rows"):
        train_step(make_batch())
    assert not optimizer.state
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2, weights=rows, accumulate_into="momentum")
    with pytest.raises(LossError, match="has to be known before its first backward"):
        accumulator.backward(ga.Loss.mean(loss_fn(model, make_batch()), over=ROWS))
    assert not optimizer.state


def test_several_processes() -> None:
    with pytest.raises(UnsupportedError, match="several processes: adding up over the processes would count"):
        check_rest(clip_norm=None, has_scaler=False, has_ranks=True)
