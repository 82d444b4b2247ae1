"""The statistics of the whole batch by themselves: what a failure leaves, calls that repeat, ranks, one piece."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from gradaccum.whole_batch.batch_norm.exact import Exact, Whole
from gradaccum.whole_batch.batch_norm.moments import Share
from gradaccum.whole_batch.lockstep.conductor import Conductor, Member
from normed import NORMED, buffers_of
from oracle import assert_same_gradients

CPU = torch.device("cpu")


def run(exact: Exact, layer: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the pieces, in lockstep."""

    def run_one(member: Member) -> Tensor:
        with exact.forward(member.meet):
            return layer(pieces[member.index])

    return Conductor(CPU, [], run_one).run(len(pieces))


def layer_and_pieces() -> tuple[nn.BatchNorm1d, nn.BatchNorm1d, tuple[Tensor, ...]]:
    """A layer, another like it, and a batch in three pieces."""
    return nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double(), torch.randn(7, 3, dtype=torch.float64).split(3)


def test_outputs_and_buffers() -> None:
    layer, expected, pieces = layer_and_pieces()
    exact = Exact([layer])
    with exact.held():
        outputs = run(exact, layer, pieces)
        assert layer.running_mean is not None
        assert not layer.running_mean.any()  # not yet
    torch.testing.assert_close(torch.cat(outputs), expected(torch.cat(pieces)), rtol=NORMED, atol=NORMED)
    assert_same_gradients(buffers_of(layer), buffers_of(expected), tolerance=NORMED)


def test_a_failure_leaves_buffers_as_they_were() -> None:
    layer, new, pieces = layer_and_pieces()

    def fail_after(_: list[Tensor]) -> None:
        raise ga.LossError("mine")

    exact = Exact([layer])
    with pytest.raises(ga.LossError, match="mine"), exact.held():
        fail_after(run(exact, layer, pieces))
    assert_same_gradients(buffers_of(layer), buffers_of(new), tolerance=0)


def test_a_call_again_takes_the_statistics_that_it_had() -> None:
    """Of a layer that is used twice, by its own mean: here each piece's, in an order of its own."""
    layer, other, pieces = layer_and_pieces()
    exact = Exact([layer])
    with exact.held():
        outputs = run(exact, lambda x: torch.stack([layer(x), layer(x.exp())]), pieces)
        with exact.backward():
            for index in (1, 0, 2):
                torch.testing.assert_close(layer(pieces[index].exp()), outputs[index][1], rtol=NORMED, atol=NORMED)
                torch.testing.assert_close(layer(pieces[index]), outputs[index][0], rtol=NORMED, atol=NORMED)
            assert torch.equal(other(pieces[0]), nn.BatchNorm1d(3).double()(pieces[0]))  # a stranger's
    assert int(layer.num_batches_tracked) == 2  # type: ignore[arg-type]


def test_across_ranks() -> None:
    """Two processes, here one after the other: each merges its own pieces, and then both."""
    layer, expected, pieces = layer_and_pieces()
    theirs = torch.randn(4, 3, dtype=torch.float64)
    other = Share(count=4, mean=theirs.mean(0), var=theirs.var(0, correction=0))
    exact = Exact([layer], across_ranks=lambda share: [share, other])
    with exact.held():
        outputs = run(exact, layer, pieces)
    torch.testing.assert_close(torch.cat(outputs), expected(torch.cat([*pieces, theirs]))[:7], rtol=NORMED, atol=NORMED)
    assert_same_gradients(buffers_of(layer), buffers_of(expected), tolerance=NORMED)


def test_a_batch_of_one_value_is_refused() -> None:
    layer = nn.BatchNorm1d(3)
    exact = Exact([layer])
    with pytest.raises(ga.BatchError, match="has 1 values per channel in the whole batch"), exact.held():
        run(exact, layer, [torch.zeros(1, 3), torch.zeros(0, 3)])


def test_a_batch_in_one_piece_advances_once_behind_a_checkpoint() -> None:
    layer, expected, _ = layer_and_pieces()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    whole = Whole([layer])
    with whole.held():
        output = whole.forward(lambda x: checkpoint(layer, x, use_reentrant=False))(x)
        (gradient,) = torch.autograd.grad(output.exp().sum(), x)
    (right,) = torch.autograd.grad(expected(x).exp().sum(), x)
    torch.testing.assert_close(gradient, right, rtol=NORMED, atol=NORMED)
    assert_same_gradients(buffers_of(layer), buffers_of(expected), tolerance=NORMED)
