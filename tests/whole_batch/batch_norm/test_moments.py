"""Statistics of pieces, merged, and normalising by them, against torch's batch norm: values and gradients."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradaccum.whole_batch.batch_norm.moments import Moments, Normalize, Share, merge, moments
from oracle import EXACT

SHAPES = [(13, 3), (13, 3, 4), (13, 3, 4, 5), (13, 3, 2, 3, 2)]
SIZES = [3, 1, 5, 4]


def fine() -> None:
    pass


def in_pieces(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Batch norm of the whole from pieces."""
    pieces = x.split(SIZES)
    whole = merged([Moments.apply(piece, fine) for piece in pieces])
    return torch.cat([Normalize.apply(piece, whole.mean, whole.var, weight, bias, eps, fine) for piece in pieces])


def merged(each: Sequence[tuple[Tensor, Tensor]]) -> Share:
    return merge([Share(count=n, mean=mean, var=var) for n, (mean, var) in zip(SIZES, each, strict=True)])


@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_are_the_whole(shape: tuple[int, ...], affine: str) -> None:
    x = torch.randn(shape, dtype=torch.float64).mul_(3).add_(2).requires_grad_()
    weight = None if affine == "neither" else torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if affine == "both" else None
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    towards = torch.randn(shape, dtype=torch.float64)
    ours = in_pieces(x, weight, bias)
    theirs = F.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    for one, other in zip(
        torch.autograd.grad((ours.exp() * towards).sum(), inputs),
        torch.autograd.grad((theirs.exp() * towards).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=10 * EXACT, atol=10 * EXACT)


@pytest.mark.parametrize("function", [lambda x: Moments.apply(x, fine), lambda x: in_pieces(x, None, None, eps=0.1)])
def test_gradients_by_differences(function: object) -> None:
    x = torch.randn(13, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_merging_does_not_cancel() -> None:
    """At a mean of a million deviations, E[x^2] - E[x]^2 has nothing left of the variance in fp32; this has."""
    x = torch.randn(13, 3, dtype=torch.float64)
    far = (x + 1e4).float()
    var = merged([moments(piece) for piece in far.split(SIZES)]).var
    naive = far.square().mean(0) - far.mean(0).square()
    expected = far.double().var(0, correction=0)
    assert ((var - expected).abs() / expected).max() < 1e-2
    assert ((naive - expected).abs() / expected).max() > 1


@pytest.mark.parametrize(("values", "expected"), [(torch.tensor([[1.0, 2.0]]), [1, 2]), (torch.zeros(0, 2, 3), [0, 0])])
def test_one_value_and_none_have_no_variance(values: Tensor, expected: list[int]) -> None:
    mean, var = moments(values)
    assert mean.tolist() == expected
    assert var.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_inputs_have_fp32_statistics(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    x = torch.randn(13, 3, 4).to(dtype).requires_grad_()
    weight = torch.randn(3).to(parameters or dtype).requires_grad_()
    mean, var = moments(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.detach().float().mean((0, 2)), rtol=1e-5, atol=1e-6)
    output = in_pieces(x, weight, None)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, weight.dtype)


def test_channels_last_stays() -> None:
    x = torch.randn(13, 3, 4, 5).to(memory_format=torch.channels_last)
    mean, var = moments(x)
    assert Normalize.apply(x, mean, var, None, None, 1e-5, fine).is_contiguous(memory_format=torch.channels_last)


def test_a_refused_backward_says_so() -> None:
    def refuse() -> None:
        raise ValueError("not now")

    x = torch.randn(4, 2, requires_grad=True)
    mean, var = Moments.apply(x, refuse)
    with pytest.raises(ValueError, match="not now"):
        (mean + var).sum().backward()
