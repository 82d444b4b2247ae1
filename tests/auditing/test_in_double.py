"""Everything is float64, whatever is asked for; integers and bits stay what they are."""

import torch
import torch.nn.functional as F
from torch import nn

import gradaccum as ga
import zoo
from gradaccum.auditing.in_double import InDouble, in_double, no_modes


def test_shorter_floats_become_longer() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    constant = torch.ones(3)
    with InDouble():
        made = [x.float(), x.to(torch.bfloat16), x.softmax(-1, dtype=torch.float32), x * constant]
        made += [x @ torch.ones(3, 2), torch.zeros(3, dtype=torch.float32), x.sum(dtype=torch.float32)]
        made += [torch.cat([x, constant[None]]), F.cross_entropy(x, torch.tensor([0, 1, 2, 0]), weight=constant)]
    assert {one.dtype for one in made} == {torch.float64}
    assert constant.dtype == torch.float32


def test_nothing_is_lost_on_the_way() -> None:
    x = torch.tensor([1.0, 1e-12], dtype=torch.float64, requires_grad=True)
    with InDouble():
        (x.float().sum() * x.half().prod()).backward()
    a, b = x.tolist()
    expected = torch.tensor([b * (2 * a + b), a * (a + 2 * b)], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected, rtol=1e-15, atol=0)


def test_integers_bits_and_what_is_written_stay() -> None:
    x, buffer = torch.randn(3, dtype=torch.float64), torch.zeros(3)
    with InDouble():
        assert torch.arange(3).dtype == torch.int64
        assert x.view(torch.int64).dtype == torch.int64
        buffer.add_(x)
        view = buffer[1:]
        view.mul_(2)
    assert buffer.dtype == torch.float32
    assert torch.allclose(buffer[1:].double(), 2 * x[1:], rtol=1e-6)


def test_a_parameter_that_was_not_handed_over_keeps_its_dtype_and_gets_no_gradient() -> None:
    temperature = nn.Parameter(torch.ones(()))
    report = ga.audit(zoo.mlp(), lambda model, batch: zoo.classes(model, batch) * temperature, zoo.vectors(), 4)
    assert report.exact
    assert report.dtype == "float64"
    assert temperature.grad is None


def test_conversion() -> None:
    assert in_double(torch.ones(2)).dtype == torch.float64
    assert in_double(torch.ones(2, dtype=torch.complex64)).dtype == torch.complex128
    assert in_double(torch.ones(2, dtype=torch.int32)).dtype == torch.int32
    assert in_double("text") == "text"


def test_numbers_that_a_graph_saved_are_read_without_modes() -> None:
    loss = torch.ones((), requires_grad=True) / 4
    with InDouble(), no_modes():
        assert float(loss.grad_fn._saved_other) == 4  # type: ignore[union-attr]
