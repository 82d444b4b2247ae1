"""Layers over the batch against the whole batch: networks, sizes, options; what is refused, and that nothing hangs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from normed import (
    CLASSES,
    NETWORKS,
    NORMED,
    ROWS,
    Batch,
    ResNet,
    assert_like_whole,
    buffers_of,
    classes_loss,
    furthest,
    make_batches,
    make_network,
    sgd,
    trained,
)
from oracle import assert_same, assert_same_gradients, whole_batches

# ------------------------------------------------------------------------------------------------------ the whole batch
SIZES: list[tuple[str, int]] = [
    *((name, size) for name in NETWORKS for size in (1, 2, 5, 12, ROWS)),
    *(("residual", size) for size in (3, 4, *range(6, 12))),
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_the_whole_batch_over_several_updates(name: str, size: int) -> None:
    updates = assert_like_whole(make_network(name), make_batches(3), micro_batch_size=size)
    assert [update.micro_batches for update in updates] == [-(-ROWS // size)] * 3
    assert [update.samples for update in updates] == [ROWS] * 3


@pytest.mark.parametrize("name", ["residual", "branching", "used twice"])
def test_without_it_the_gradient_is_another(name: str) -> None:
    assert furthest(make_network(name), make_batches(1), micro_batch_size=4, batch_norm="micro") > 0.05
    assert furthest(make_network(name), make_batches(1), micro_batch_size=4) < NORMED


def test_activations_that_are_recomputed() -> None:  # on the host: test_activations
    assert_like_whole(make_network("residual"), make_batches(3), micro_batch_size=4, activations="recompute")


@pytest.mark.parametrize("size", [5, ROWS])
def test_a_ragged_last_batch(size: int) -> None:
    batches = [*make_batches(2), *make_batches(1, rows=7), *make_batches(1, rows=3)]
    assert_like_whole(make_network("residual"), batches, micro_batch_size=size)


def test_without_batch_norm_it_is_plain() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).double()
    model(make_batches(1)[0][0])
    assert_like_whole(model, make_batches(2), micro_batch_size=4)


def test_backward_gives_the_gradient_alone() -> None:
    model = make_network("residual")
    whole = copy.deepcopy(model)
    batch = make_batches(1)[0]
    loss = ga.TrainStep(model, sgd(model), classes_loss, micro_batch_size=4, batch_norm="exact").backward(batch)
    expected = classes_loss(whole, batch)
    expected.backward()
    torch.testing.assert_close(loss.value, expected.detach(), rtol=NORMED, atol=0)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=NORMED, atol=NORMED)


def test_several_models() -> None:
    body, head = make_network("residual"), nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Linear(CLASSES, 1)).double()
    whole = copy.deepcopy(nn.ModuleList([body, head]))

    def loss(models: Any, batch: Batch) -> Tensor:
        return models[1](models[0](batch[0])).square().mean()

    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    step = ga.TrainStep([body, head], optimizer, loss, micro_batch_size=4, batch_norm="exact")
    batches = make_batches(2)
    for batch in batches:
        step(batch)
    whole_batches(whole, sgd(whole), batches, loss)
    both = nn.ModuleList([body, head])
    assert_same_gradients(dict(both.named_parameters()), dict(whole.named_parameters()), tolerance=NORMED)
    assert_same_gradients(buffers_of(both), buffers_of(whole), tolerance=NORMED)


# --------------------------------------------------------------------------------------------------------------- losses
def weighted(model: nn.Module, batch: Batch) -> Any:
    """Over the samples of some classes, of which a micro-batch may have none."""
    counts = batch[1] < 2
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ga.Loss.sum((losses * counts).sum(), over=counts.sum())


def whole_weighted(model: nn.Module, batch: Batch) -> Tensor:
    counts = batch[1] < 2
    return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * counts).sum() / counts.sum()


def test_losses_of_different_weight() -> None:
    assert_like_whole(
        make_network("residual"), make_batches(2), weighted, whole_loss=whole_weighted, micro_batch_size=2
    )


def test_terms_over_different_things_need_no_totals() -> None:
    """Lockstep has all losses before the first backward, so it knows what they add up to."""

    def terms(model: nn.Module, batch: Batch) -> dict[str, Any]:
        output = model(batch[0])
        return {"size": output.square().mean(), "class": weighted(lambda _: output, batch)}  # type: ignore[arg-type]

    def whole(model: nn.Module, batch: Batch) -> Tensor:
        output = model(batch[0])
        return output.square().mean() + whole_weighted(lambda _: output, batch)  # type: ignore[arg-type]

    updates = assert_like_whole(make_network("residual"), make_batches(2), terms, whole_loss=whole, micro_batch_size=5)
    assert set(updates[0].losses) == {"size", "class"}


def test_a_mean_that_is_not_over_samples_is_found() -> None:
    def ignoring(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)

    with pytest.raises(ga.MeanError, match="targets that are not ignored"):
        trained(make_network("residual"), make_batches(1), ignoring, micro_batch_size=4)


@pytest.mark.parametrize("size", [1, 5, ROWS])
@pytest.mark.parametrize("combine", ["concat", "sum"])
def test_a_loss_over_the_batch_too(size: int, combine: str) -> None:
    def forward(model: nn.Module, batch: Batch) -> Any:
        z = F.normalize(model(batch[0]), dim=1)
        return {"z": z} if combine == "concat" else {"z": z.t() @ z}

    def batch_loss(outputs: Any, batch: Batch) -> Tensor:
        z = outputs["z"]
        return F.cross_entropy(5 * z @ z.t(), batch[1]) if combine == "concat" else z.square().sum().sqrt()

    def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch_loss(forward(model, batch), batch)

    options: dict[str, Any] = {"forward": forward, "batch_loss": batch_loss, "combine": combine}
    model, batches = make_network("residual"), make_batches(2)
    assert_like_whole(model, batches, None, whole_loss=whole_loss, micro_batch_size=size, **options)


# ---------------------------------------------------------------------------------------- precision, conditions
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """bf16 rounds to 8 bits: 0.4% each time, some ten times in a row."""
    batches = make_batches(1, dtype=torch.float32)
    model = make_network("residual").float()
    reference = copy.deepcopy(model)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return classes_loss(model, batch)

    dtypes: list[torch.dtype] = []
    model.blocks[1].bn2.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    step = ga.TrainStep(model, sgd(model), loss if inside else classes_loss, micro_batch_size=4, batch_norm="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        update = step(batches[0])
    assert set(dtypes) == {torch.bfloat16}
    expected = loss(reference, batches[0])
    assert abs(float(update.loss) - expected.item()) < 0.03
    for name, running in buffers_of(model).items():
        if "num" in name:
            assert int(running) == 1


def test_bf16_parameters() -> None:
    model = make_network("residual").bfloat16()
    whole = copy.deepcopy(model)
    batch = make_batches(1)[0][0].bfloat16(), make_batches(1)[0][1]
    made, _ = trained(model, [batch], micro_batch_size=4)
    assert abs(made[0].loss - classes_loss(whole, batch).item()) < 0.03


def test_channels_last() -> None:
    model = make_network("residual").to(memory_format=torch.channels_last)
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in make_batches(2)]
    assert_like_whole(model, batches, micro_batch_size=4)


def test_a_frozen_encoder_in_training_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = ResNet(blocks=1), nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.encoder(x)
            return self.head(features)

    assert_like_whole(Net().double(), make_batches(2), micro_batch_size=4)


# --------------------------------------------------------------------------------------------------------- checkpoints
class Checkpointed(nn.Module):
    """Blocks behind checkpoints, with a layer that is used in two of them."""

    def __init__(self, *, use_reentrant: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = ResNet(blocks=2, dropout=dropout)
        self.shared = nn.BatchNorm2d(5)
        self.run: Callable[..., Tensor] = functools.partial(checkpoint, use_reentrant=use_reentrant)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net.bn(self.net.stem(x))
        for block in self.net.blocks:
            hidden = self.run(lambda x, block=block: self.dropout(self.shared(block(self.dropout(x)))), hidden)
        return self.net.head(hidden.mean((2, 3)))

    def without_checkpoints(self) -> Checkpointed:
        """A copy that runs its blocks as they are."""
        plain = copy.deepcopy(self)
        plain.run = lambda function, x: function(x)
        return plain


@pytest.mark.parametrize("size", [1, 4, ROWS])
def test_the_users_checkpoints(size: int) -> None:
    """Running statistics advance once; torch alone advances them again in the backward of a checkpoint."""
    model = Checkpointed().double()
    assert_like_whole(model, make_batches(2), whole=model.without_checkpoints(), micro_batch_size=size)


def test_dropout_is_drawn_again_alike_in_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = Checkpointed(dropout=0.5).double()
    plain = model.without_checkpoints()
    batch = make_batches(1)
    torch.manual_seed(1)
    made, _ = trained(model, batch, micro_batch_size=4)
    torch.manual_seed(1)
    expected, _ = trained(plain, batch, micro_batch_size=4)
    assert_same(made, expected, tolerance=NORMED)


def test_a_reentrant_checkpoint_is_refused() -> None:
    model = Checkpointed(use_reentrant=True).double()
    with pytest.raises(ga.UnsupportedError, match=r"bn.*by a reentrant checkpoint.*use_reentrant=False"):
        trained(model, make_batches(1), micro_batch_size=4)


def test_a_reentrant_checkpoint_without_batch_norm_is_fine() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.mlp = nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.mlp, self.bn(x), use_reentrant=True).mean((2, 3))

    assert_like_whole(Net().double(), make_batches(2), micro_batch_size=4)
