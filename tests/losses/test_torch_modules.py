"""A module handed over to its functional form."""

from __future__ import annotations

import pytest
from torch import nn

from gradaccum.losses.torch_modules import form_of, torch_class_of
from losses.torch_cases import CASES


class Renamed(nn.HuberLoss):
    pass


class Overridden(nn.HuberLoss):
    def forward(self, input, target):  # type: ignore[no-untyped-def]
        return super().forward(input, target)


@pytest.mark.parametrize("name", CASES)
def test_a_module_passes_all_that_its_functional_form_requires(name: str) -> None:
    module = CASES[name].module()
    form = form_of(module)
    assert form is not None
    options = form.options(module)
    parameters = form.rule.signature.parameters
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required <= options.keys() | set(form.inputs)
    assert options.keys() <= parameters.keys()
    assert len(form.inputs) == len(form.signature.parameters) - 1  # without self


@pytest.mark.parametrize("name", CASES)
def test_every_option_that_a_module_has_is_passed(name: str) -> None:
    """What the functional form can be told, and the module knows by the same name, is not left to a default."""
    module = CASES[name].module()
    form = form_of(module)
    assert form is not None
    known = {name for name in form.rule.signature.parameters if hasattr(module, name)}
    assert known <= form.options(module).keys()


def test_a_form_belongs_to_a_forward() -> None:
    assert form_of(Renamed()) is form_of(nn.HuberLoss())
    assert form_of(Overridden()) is None
    assert form_of(nn.ReLU()) is None
    replaced = nn.HuberLoss()
    replaced.forward = lambda input, target: input  # pyright: ignore[reportAttributeAccessIssue]
    assert form_of(replaced) is None


def test_the_class_of_torch_behind_a_module() -> None:
    assert torch_class_of(Overridden()) is nn.HuberLoss
    assert torch_class_of(nn.HuberLoss()) is nn.HuberLoss
    assert torch_class_of(nn.ReLU()) is None
