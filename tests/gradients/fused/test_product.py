"""``grad += alpha * left @ right``, in every mixture of dtypes."""

import pytest
import torch
from torch import nn

from gradaccum.gradients.fused.product import GradientMemory, add_product

LOW = [torch.bfloat16, torch.float16]


def factors(dtype: torch.dtype, *batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*batch, 3, 5).to(dtype), torch.randn(*batch, 5, 4).to(dtype)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "batch of matrices"])
@pytest.mark.parametrize("alpha", [1, 0.5])
@pytest.mark.parametrize("is_first", [True, False])
def test_in_one_dtype(is_first: bool, alpha: float, batch: tuple[int, ...]) -> None:
    left, right = factors(torch.float64, *batch)
    parameter = nn.Parameter(torch.zeros(*batch, 3, 4, dtype=torch.float64))
    before = torch.zeros_like(parameter) if is_first else torch.randn_like(parameter)
    parameter.grad = None if is_first else before.detach().clone()
    add_product(parameter, left, right, alpha=alpha, memory=GradientMemory())
    torch.testing.assert_close(parameter.grad, (before + alpha * left @ right).detach())


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_into_fp32_loses_nothing_of_256_plus_1(dtype: torch.dtype) -> None:
    """In bf16, 256 + 1 is 256."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    for value in (256.0, 1.0):
        add_product(
            parameter,
            torch.tensor([[value]], dtype=dtype),
            torch.ones(1, 1, dtype=dtype),
            alpha=1,
            memory=GradientMemory(),
        )
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.item() == 257.0


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_parameter_with_an_fp32_sum(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    parameter.grad_dtype = torch.float32
    left, right = factors(dtype)
    for _ in range(2):
        add_product(parameter, left, right, alpha=1, memory=GradientMemory())
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, 2 * left.float() @ right.float(), rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
def test_on_cuda_low_precision_is_added_in_fp32(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3, 4, device="cuda"))
    left, right = (factor.cuda() for factor in factors(dtype))
    for _ in range(2):
        add_product(parameter, left, right, alpha=1, memory=GradientMemory())
    torch.testing.assert_close(parameter.grad, 2 * left.float() @ right.float(), rtol=1e-5, atol=1e-5)
