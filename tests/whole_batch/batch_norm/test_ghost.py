"""Fixed groups: the same gradient whatever the micro-batch size, held against a loop over the groups."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.split.by_samples import split_by_groups
from normed import (
    CLASSES,
    NORMED,
    ROWS,
    Batch,
    Checkpointed,
    ResNet,
    Twice,
    assert_like_whole,
    buffers_of,
    classes_loss,
    make_batches,
    make_network,
    trained,
)
from oracle import assert_same_gradients, parameters_of
from scarce import Memory, Scarce

NETWORKS = ["residual", "branching", "cumulative", "1d and 3d", "derived", "half frozen", "neither", "synchronised"]


def by_group(model: nn.Module, x: Tensor, samples: int) -> Tensor:
    """The outputs of a batch whose groups are forwarded one by one, by plain torch."""
    return torch.cat([model(group) for group in x.split(ga.GhostBatch(samples).group_sizes(len(x)))])


def assert_like_groups(model: nn.Module, batches: list[Batch], samples: int, **options: Any) -> list[ga.Update]:
    """Without buffers: torch advances them with every group."""

    def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(by_group(model, batch[0], samples), batch[1])

    groups = {"batch_norm": ga.GhostBatch(samples), "whole_loss": whole_loss, "buffers": False}
    return assert_like_whole(model, batches, **{**groups, **options})


@pytest.mark.parametrize("size", [4, 9, ROWS, "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_one_by_one(name: str, size: Any) -> None:
    assert_like_groups(make_network(name), make_batches(3), 4, micro_batch_size=size)


@pytest.mark.parametrize("samples", [2, 3, 5, 6, 12, ROWS, 100])
def test_every_group_size(samples: int) -> None:
    for size in (max(samples, 3), ROWS + samples):
        assert_like_groups(make_network("residual"), make_batches(1), samples, micro_batch_size=size)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("size", [4, 8, ROWS])
def test_running_statistics_advance_once_from_the_merged_groups(
    size: int, momentum: float | None, lockstep: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.Flatten(), nn.Linear(108, CLASSES)).double()
    batches = make_batches(2)
    trained(model, batches, micro_batch_size=size, batch_norm=ga.GhostBatch(4), lockstep=lockstep)
    expected = nn.BatchNorm2d(3, momentum=momentum).double()
    for x, _ in batches:
        expected(x)  # the layer sees the data itself, so the merged statistics are the batch's
    assert_same_gradients(buffers_of(model[0]), buffers_of(expected), tolerance=NORMED)


def test_a_layer_used_twice_counts_twice() -> None:
    class Apart(Twice):
        """Without the call that has two rows for each sample."""

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.bn(self.first(x.flatten(1))))
            return self.head(self.bn(self.second(hidden)))

    model = Apart().double()
    trained(model, make_batches(2), micro_batch_size=4, batch_norm=ga.GhostBatch(4))
    assert int(model.bn.num_batches_tracked) == 4


def test_rows_that_are_not_samples_are_refused() -> None:
    with pytest.raises(ga.UnsupportedError, match=r"both got 8 rows in a micro-batch of 4 samples"):
        trained(make_network("used twice"), make_batches(1), micro_batch_size=4, batch_norm=ga.GhostBatch(4))


@pytest.mark.parametrize("size", [4, ROWS])
def test_in_a_checkpoint(size: int) -> None:
    torch.manual_seed(0)
    straight = ResNet(blocks=1).double()
    model = Checkpointed(copy.deepcopy(straight))
    batches = make_batches(2)
    for one in (model, straight):
        trained(one, batches, micro_batch_size=size, batch_norm=ga.GhostBatch(4))
    made = {name: parameter.detach() for name, parameter in model.net.named_parameters()}
    torch.testing.assert_close(made, parameters_of(straight), rtol=NORMED, atol=NORMED)
    assert_same_gradients(buffers_of(model.net), buffers_of(straight), tolerance=NORMED)


@pytest.mark.parametrize("kept_graphs", [0, 1, None])
@pytest.mark.parametrize("size", [4, ROWS])
def test_a_loss_over_the_batch_too(size: int, kept_graphs: int | None) -> None:
    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return F.normalize(model(batch[0]), dim=1)

    def batch_loss(z: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(5 * z @ z.t(), batch[1])

    def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch_loss(F.normalize(by_group(model, batch[0], 4), dim=1), batch)

    model = make_network("residual")
    plain = copy.deepcopy(model)
    batches = make_batches(2)
    options: dict[str, Any] = {"batch_norm": ga.GhostBatch(4), "forward": forward, "batch_loss": batch_loss}
    two_passes: dict[str, Any] = {"micro_batch_size": size, "kept_graphs": kept_graphs, **options}
    assert_like_whole(model, batches, None, whole_loss=whole_loss, buffers=False, **two_passes)
    trained(plain, batches, None, micro_batch_size=4, lockstep=True, **options)
    assert_same_gradients(buffers_of(model), buffers_of(plain), tolerance=NORMED)
    assert int(model.bn.num_batches_tracked) == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory(where: str) -> None:
    torch.manual_seed(0)
    memory = Memory(limit=9)
    model = nn.Sequential(nn.BatchNorm2d(3), Scarce(memory, where=where), nn.Flatten(), nn.Linear(108, CLASSES))
    model = model.double()
    whole = copy.deepcopy(model)
    whole[1] = nn.Identity()
    updates = assert_like_groups(model, make_batches(3), 4, whole=whole, micro_batch_size="auto")
    assert memory.failures > 0
    assert updates[0].micro_batch_size == 8
    assert int(model[0].num_batches_tracked) == 3


def test_an_update_that_fails_leaves_the_buffers() -> None:
    model = make_network("residual")
    before = buffers_of(model)

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        if len(batch[1]) == 5:
            raise ValueError("mine")
        return classes_loss(model, batch)

    with pytest.raises(ValueError, match="mine"):
        trained(model, make_batches(1), fails, micro_batch_size=4, batch_norm=ga.GhostBatch(4))
    assert_same_gradients(buffers_of(model), before, tolerance=0)


# ------------------------------------------------------------------------------------------------------ how it is cut
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(12, [4, 4, 4]), (13, [4, 4, 5]), (14, [4, 4, 4, 2]), (3, [3]), (1, [1]), (5, [5]), (0, [])],
)
def test_groups(rows: int, sizes: list[int]) -> None:
    assert ga.GhostBatch(4).group_sizes(rows) == sizes


@pytest.mark.parametrize("rows", range(1, 30))
@pytest.mark.parametrize("max_rows", [4, 7, 8, 100])
def test_pieces_hold_whole_groups(rows: int, max_rows: int) -> None:
    groups = ga.GhostBatch(4)
    split = split_by_groups(groups)
    batch = torch.zeros(rows, 1)
    pieces = split.plan(batch, split.largest(batch), max_rows=max_rows)
    in_pieces = [size for piece in pieces for size in groups.group_sizes(piece.stop - piece.start)]
    assert in_pieces == groups.group_sizes(rows)
    assert max(piece.stop - piece.start for piece in pieces) <= max(max_rows, 4) + 1
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows))


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("samples", [1, 0, -2, 2.0, True, None])
def test_groups_of_less_than_two_are_refused(samples: Any) -> None:
    with pytest.raises(ga.WindowError, match="groups of so many samples, an int of at least 2"):
        ga.GhostBatch(samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, r"micro_batch_size=3 is less than the groups of GhostBatch\(samples=4\)"),
        ({"split": ga.split_by_cost(len, 3)}, "takes BatchNorm's statistics over consecutive samples"),
    ],
)
def test_groups_that_would_be_cut_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ga.WindowError, match=message):
        trained(make_network("residual"), [], batch_norm=ga.GhostBatch(4), **options)
