"""The layers by name, what is refused, and frozen ones: statistics stay, parameters train, modes are put back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.whole_batch.batch_norm.layers import Call, Layers, batch_norms, refuse_unseen
from normed import (
    ROWS,
    Batch,
    Checkpointed,
    ResNet,
    WithActivation,
    assert_like_whole,
    buffers_of,
    make_batches,
    make_network,
    trained,
)
from oracle import assert_same_gradients


def call_of(layer: nn.modules.batchnorm._BatchNorm) -> Call:
    x = torch.zeros(2, layer.num_features)
    return Call(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, 0.1, 1e-5)


def test_names_and_keys() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2, affine=False)))
    untracked = nn.BatchNorm1d(2, track_running_stats=False)
    layers = Layers([model, nn.Sequential(untracked), nn.BatchNorm1d(3)])
    assert layers.name(call_of(model[1][0])) == "0.1.0"
    assert layers.name(call_of(model[1][1])) == "0.1.1"
    assert layers.name(call_of(untracked)) == "1.0"
    assert Layers([untracked]).name(call_of(untracked)) == "BatchNorm1d"
    nameless = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    assert layers.name(call_of(nameless)) == "a batch norm of 5 channels"
    assert layers.may_have(call_of(nameless))
    assert not layers.may_have(call_of(nn.BatchNorm1d(2)))
    assert len(batch_norms([model, untracked])) == 3
    one, other = (layers.key(call_of(layer)) for layer in model[1])
    assert one == layers.key(call_of(model[1][0])) != other


def test_compiled_parts_without_batch_norm_are_fine() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].compile(backend="eager")
    refuse_unseen([model], wanted="this")
    model[1].compile(backend="eager")
    with pytest.raises(ga.UnsupportedError, match=r"this has to see .* '1' is run by torch.compile"):
        refuse_unseen([model], wanted="this")


def test_layers_that_synchronise_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(2))
    refuse_unseen([model], wanted="this")
    two = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(torch, "distributed", two)
    with pytest.raises(ga.UnsupportedError, match="between 2 processes by itself"):
        refuse_unseen([model], wanted="this")
    refuse_unseen([nn.BatchNorm1d(2)], wanted="this")
    refuse_unseen([model.eval()], wanted="this")


# -------------------------------------------------------------------------------------------------------------- frozen
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
    assert_like_whole(
        model, make_batches(3), whole=whole, micro_batch_size=size, batch_norm="frozen", lockstep=lockstep
    )
    assert_same_gradients(buffers_of(model), before, tolerance=0)
    assert [module.training for module in model.modules()] == modes


def test_dropout_stays_on() -> None:
    seen: list[bool] = []
    model = ResNet(blocks=1, norm=WithActivation, dropout=0.5).double()
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    trained(model, make_batches(1), micro_batch_size=4, batch_norm="frozen")
    assert seen == [True] * 4


def test_a_checkpoint_runs_again_with_the_same_statistics() -> None:
    model = Checkpointed(settled("residual"))
    whole = in_evaluation(copy.deepcopy(model))
    assert_like_whole(model, make_batches(2), whole=whole, micro_batch_size=4, batch_norm="frozen")


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
