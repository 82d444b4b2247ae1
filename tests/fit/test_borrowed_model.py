"""After a model was borrowed, everything is the same object with the same bits as before; also after an error."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.fit.borrowed_model import SavedBeforeWriting, borrowed, sharing_memory
from gradaccum.memory.fakes import fake_mode, fake_of


class Busy(nn.Module):
    """A model that changes all it can in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight  # tied
        self.lstm = nn.LSTM(4, 4)
        self.calls, self.mask = 0, None
        self.cache: dict[str, Any] = {"nested": {"mask": None}, "list": [1, 2]}
        self.seen, self.last, self.order = {1}, deque([1], maxlen=2), OrderedDict(a=1, b=2)
        self.stream = torch.Generator().manual_seed(3)
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mask = torch.ones(4)
        self.cache["nested"]["mask"] = self.mask
        self.cache["list"].append(self.mask)
        self.seen.add(2)
        self.last.append(3)
        self.order.move_to_end("a")
        self.late = self.mask
        self.new_attribute = self.mask
        torch.randn(1), random.random(), np.random.rand(), torch.rand(1, generator=self.stream)
        self.eval().train()
        return self.second(self.norm(self.first(x))) + self.lstm(x.unsqueeze(0))[0][0]


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Identities and values of all that must not change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "ids": [(name, id(tensor), id(tensor.grad)) for name, tensor in tensors],
        "values": [tensor.detach().clone() for _, tensor in tensors],
        "versions": [tensor._version for _, tensor in tensors],
        "gradients": [tensor.grad.clone() for _, tensor in tensors if tensor.grad is not None],
        "training": [module.training for module in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(module).items()} for module in model.modules()],
        "contents": repr([model.cache, model.seen, model.last, model.order, model.calls, model.late]),  # type: ignore[attr-defined]
        "random": [torch.get_rng_state(), str(random.getstate()), str(np.random.get_state()), model.stream.get_state()],  # type: ignore[attr-defined,operator]
        "optimizer": repr(optimizer.state_dict()),
        "flat weights": [id(weight) for weight in model.lstm._flat_weights],  # type: ignore[attr-defined,union-attr]
    }


def assert_same(before: Any, after: Any) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        for one, other in zip(value, after[key], strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, key


STAND_INS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "sharing memory": lambda: sharing_memory,
    "fake": lambda: lambda tensor: fake_of(tensor, mode=MODE, device=torch.device("cpu")),
}
MODE = fake_mode()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", STAND_INS)
def test_nothing_has_changed(kind: str, fails: bool) -> None:
    model = Busy()
    model.norm.eval()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    for parameter in [*model.first.parameters(), temperature]:
        parameter.grad = torch.randn_like(parameter)
    gradient = temperature.grad
    before = everything(model, optimizer)
    with suppress(ZeroDivisionError), borrowed([model], [optimizer], STAND_INS[kind]()):
        assert model.first.weight is model.second.weight
        assert model.first.weight.grad is None
        with MODE if kind == "fake" else nullcontext():
            (model(torch.ones(3, 4)) * temperature).sum().backward()
        assert model.first.weight.grad is not None
        if fails:
            raise ZeroDivisionError
    assert_same(before, everything(model, optimizer))
    assert temperature.grad is gradient
    assert not hasattr(model, "new_attribute")
    assert model.mask is None


def test_gradient_mode_is_on_inside_and_put_back() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        with borrowed([model], [], sharing_memory):
            assert model(torch.ones(1, 2)).requires_grad
        assert not torch.is_grad_enabled()


def test_the_users_hooks_do_not_run() -> None:
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda gradient: pytest.fail("a hook of the user's ran"))
    with borrowed([model], [], sharing_memory):
        model(torch.ones(1, 2)).sum().backward()


def test_casts_of_stand_ins_are_not_kept() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with borrowed([model], [], sharing_memory):
            model(x).sum().backward()
        model(x).sum().backward()
    assert model.weight.grad is not None


class Teacher(nn.Module):
    """Writes parameters in its forward: in place, and by giving them other data."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("large", torch.zeros(5 << 20))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.student.weight, alpha=0.1)
            torch._foreach_mul_([self.teacher.weight], 2.0)
            self.teacher.bias.data = self.teacher.bias * 0.5
            self.large[:2] = 1
        return self.student(x) - self.teacher(x)


def test_parameters_that_the_forward_writes() -> None:
    model = Teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = SavedBeforeWriting([*model.parameters(), *model.buffers()])
    with borrowed([model], [], sharing_memory):
        for _ in range(2):
            with saved:
                model(torch.randn(3, 4)).sum().backward()
                assert not torch.equal(model.teacher.weight, before["teacher.weight"])
            assert saved.has_saved
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_saved_of_what_is_only_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    saved = SavedBeforeWriting(list(model.parameters()))
    with saved:
        model(torch.randn(3, 4)).sum().backward()
    assert not saved.has_saved
