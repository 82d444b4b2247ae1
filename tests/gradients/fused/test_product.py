"""``grad += alpha * left @ right`` in every mixture of dtypes; a window's first gradients are written where the last
window's were, unless somebody still has those.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga
from gradaccum.gradients.fused.product import GradientMemory, add_product

LOW = [torch.bfloat16, torch.float16]


def factors(dtype: torch.dtype, *batch: int) -> tuple[Tensor, Tensor]:
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
        left, right = torch.tensor([[value]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
        add_product(parameter, left, right, alpha=1, memory=GradientMemory())
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.item() == 257.0


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 2.0**-8), pytest.param("cuda", 1e-5, marks=pytest.mark.gpu)])
def test_low_precision_is_added_in_fp32(device: str, tolerance: float, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=dtype if device == "cpu" else torch.float32, device=device))
    parameter.grad_dtype = torch.float32
    left, right = (factor.to(device) for factor in factors(dtype))
    for _ in range(2):
        add_product(parameter, left, right, alpha=1, memory=GradientMemory())
    torch.testing.assert_close(parameter.grad, 2 * left.float() @ right.float(), rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------- memory
def kept(hold: Callable[[Tensor], Any] = lambda gradient: None) -> tuple[GradientMemory, nn.Parameter, int, Any]:
    """A memory with the gradient of one parameter, the parameter, where the gradient was, and what holds it."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.ones(2, 3)
    memory, where, held = GradientMemory(), parameter.grad.data_ptr(), hold(parameter.grad)
    memory.keep([parameter])
    parameter.grad = None
    return memory, parameter, where, held


def test_what_nobody_holds_is_used_again_but_once() -> None:
    memory, parameter, where, _ = kept()
    first = memory.take(parameter, torch.float32)
    assert first.data_ptr() == where
    assert memory.take(parameter, torch.float32).data_ptr() != where


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "a name": lambda gradient: gradient,
    "a view": lambda gradient: gradient[0],
    "detached": lambda gradient: gradient.detach(),
    "numpy": lambda gradient: gradient.numpy(),
    "its storage": lambda gradient: gradient.untyped_storage(),
    "dlpack": lambda gradient: gradient.__dlpack__(),
    "as another's gradient": lambda gradient: _with_gradient(gradient),
    "a closure": lambda gradient: lambda: gradient,
    "saved for a backward": lambda gradient: gradient * torch.ones(3, requires_grad=True),
}


def _with_gradient(gradient: Tensor) -> nn.Parameter:
    other = nn.Parameter(torch.zeros(2, 3))
    other.grad = gradient
    return other


@pytest.mark.parametrize("name", HOLDS)
def test_what_somebody_holds_is_theirs(name: str) -> None:
    memory, parameter, where, held = kept(HOLDS[name])
    assert memory.take(parameter, torch.float32).data_ptr() != where
    assert held is not None


def test_another_dtype_or_shape_is_new() -> None:
    memory, parameter, *_ = kept()
    assert memory.take(parameter, torch.float64).dtype == torch.float64
    memory, parameter, *_ = kept()
    parameter.data = torch.zeros(4, 3)
    assert memory.take(parameter, torch.float32).shape == (4, 3)


def test_new_memory_has_the_parameters_strides() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2).t())
    assert GradientMemory().take(parameter, torch.float32).stride() == parameter.stride()


def test_nothing_is_kept_when_it_is_freed() -> None:
    memory, *_ = kept()
    memory.keep(())
    assert not memory._kept


def windows(hold: list[Tensor | None]) -> list[int]:
    """Where the weight's gradient is in each of three windows."""
    model = nn.Linear(64, 32, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    places: list[int] = []

    def look(*_: Any) -> None:
        gradient = model.weight.grad
        assert gradient is not None
        places.append(gradient.data_ptr())
        if hold:
            hold.append(gradient)

    optimizer.register_step_pre_hook(look)
    accumulator = ga.Accumulator(model, optimizer, micro_batches=2, fused=True)
    for x in accumulator.over([torch.randn(3, 64) for _ in range(6)]):
        accumulator.backward(model(x).pow(2).mean())
    return places


def test_windows_write_to_the_same_place_but_over_no_gradient_that_a_user_collects() -> None:
    assert len(set(windows([]))) == 1
    collected: list[Tensor | None] = [None]
    assert len(set(windows(collected))) == 3
    values = [gradient for gradient in collected if gradient is not None]
    assert not torch.equal(values[0], values[1])


def test_without_accumulation_nothing_is_held_between_updates() -> None:
    model = nn.Linear(64, 32, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ga.TrainStep(model, optimizer, lambda m, x: m(x).pow(2).mean(), micro_batch_size=4, fused=True)
    step(torch.randn(4, 64))
    fused = step._accumulation._gradients._fused
    assert fused is not None
    assert not fused._memory._kept
    step(torch.randn(8, 64))
    assert len(fused._memory._kept) == 1
