"""Sketches of gradients: they add up as gradients do, and show what does not."""

import pytest
import torch
from torch import Tensor

from gradaccum.checking.gradient_sketch import SIZE, norms_of, sketch_of

LARGE = 5 * SIZE + 7  # not a multiple


def gradients(count: int, numel: int = LARGE, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(numel, dtype=dtype) for _ in range(count)]


def sketched(*tensors: Tensor | None) -> Tensor:
    return sketch_of(tensors, [torch.empty(LARGE) if one is None else one for one in tensors]).vector


def test_sketches_add_up() -> None:
    first, second = gradients(2)
    made = 0.3 * sketched(first) + 0.7 * sketched(second)
    expected = sketched(0.3 * first + 0.7 * second)
    assert len(expected) == SIZE
    assert (made - expected).norm() < 1e-14 * expected.norm()


def test_the_norm_is_kept() -> None:
    (gradient,) = gradients(1)
    assert sketched(gradient).norm() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("place", [0, SIZE, LARGE - 1])
def test_a_single_element_shows(place: int) -> None:
    (gradient,) = gradients(1)
    other = gradient.clone()
    other[place] += 1
    assert (sketched(gradient) - sketched(other)).norm() == pytest.approx(1.0)


def test_small_ones_are_kept_whole() -> None:
    (gradient,) = gradients(1, SIZE, torch.float32)
    assert torch.equal(sketched(gradient), gradient.double())


def test_half_precision_is_summed_in_single() -> None:
    first, second = gradients(2, dtype=torch.bfloat16)
    made = sketched(first) + sketched(second)
    expected = sketched(first.double() + second.double())
    assert (made - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("numel", [4, LARGE])
def test_complex_numbers_are_two_real_ones(numel: int) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(numel, dtype=torch.complex128)
    found = sketch_of([gradient], [gradient])
    assert found.sizes == (min(2 * numel, SIZE),)
    assert found.vector.norm() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_none_is_zeros_of_the_same_size() -> None:
    (gradient,) = gradients(1)
    found = sketch_of([None, gradient[:3]], [gradient, gradient[:3]])
    missing, there = found
    assert missing is None
    assert there is not None
    assert torch.equal(there, gradient[:3])
    assert found.norms()[0] == 0
    assert torch.equal(found.norms(), norms_of(found.vector, found.sizes))
