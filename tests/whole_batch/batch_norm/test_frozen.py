"""Running statistics normalise and stay, weights train, and every mode is put back."""

from __future__ import annotations

import copy

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from normed import (
    NORMED,
    ROWS,
    Batch,
    ResNet,
    WithActivation,
    buffers_of,
    classes_loss,
    make_batches,
    make_network,
    sgd,
    trained,
)
from oracle import assert_same, assert_same_gradients, whole_batches


def settled(name: str) -> nn.Module:
    """With running statistics of its own."""
    model = make_network(name)
    for x, _ in make_batches(3):
        model(x)
    return model


def in_evaluation(model: nn.Module) -> nn.Module:
    """The layers alone."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    return model


@pytest.mark.parametrize("size", [1, 4, ROWS])
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", ["residual", "branching", "used twice", "derived", "synchronised", "half frozen"])
def test_the_whole_batch_with_layers_in_evaluation_mode(name: str, lockstep: bool, size: int) -> None:
    model = settled(name)
    whole = in_evaluation(copy.deepcopy(model))
    before, modes = buffers_of(model), [module.training for module in model.modules()]
    batches = make_batches(3)
    made, _ = trained(model, batches, micro_batch_size=size, batch_norm="frozen", lockstep=lockstep)
    assert_same(made, whole_batches(whole, sgd(whole), batches, classes_loss), tolerance=NORMED)
    assert_same_gradients(buffers_of(model), before, tolerance=0)
    assert [module.training for module in model.modules()] == modes


def test_dropout_stays_on() -> None:
    seen: list[bool] = []
    model = ResNet(blocks=1, norm=WithActivation, dropout=0.5).double()
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    trained(model, make_batches(1), micro_batch_size=4, batch_norm="frozen")
    assert seen == [True] * 4


def test_a_checkpoint_runs_again_with_the_same_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = settled("residual")

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    model = Net()
    whole = in_evaluation(copy.deepcopy(model))
    batches = make_batches(2)
    made, _ = trained(model, batches, micro_batch_size=4, batch_norm="frozen")
    assert_same(made, whole_batches(whole, sgd(whole), batches, classes_loss), tolerance=NORMED)


def test_modes_are_put_back_after_an_error() -> None:
    def fails(model: nn.Module, batch: Batch) -> Tensor:
        assert not model.bn.training
        raise ValueError("mine")

    model = settled("residual")
    with pytest.raises(ValueError, match="mine"):
        trained(model, make_batches(1), fails, micro_batch_size=4, batch_norm="frozen")
    assert all(module.training for module in model.modules())


def test_layers_without_running_statistics_are_refused() -> None:
    with pytest.raises(ga.UnsupportedError, match=r"3 of 4 BatchNorm layers have none"):
        trained(make_network("no tracking"), make_batches(1), micro_batch_size=4, batch_norm="frozen")
