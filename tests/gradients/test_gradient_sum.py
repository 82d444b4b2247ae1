"""Gradients in `.grad`: they add up as torch's own do, nothing may be there before, and nobody may touch them."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradaccum as ga
from gradaccum.gradients.gradient_sum import GradientSum


def model_of(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def summing(*models: nn.Module) -> GradientSum:
    return GradientSum([named for model in models for named in model.named_parameters()])


def add(gradients: GradientSum, loss: Tensor, seed: float = 1.0) -> None:
    gradients.add((loss,), (torch.tensor(seed, dtype=loss.dtype),))


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def assert_as_by_torch(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    found = grads(model)
    model.zero_grad()
    loss().backward()
    for one, other in zip(found, grads(model), strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------------------- they add up
def test_it_is_torchs_own_backward() -> None:
    model, x = model_of(3, 4, 1), torch.randn(5, 3)
    gradients = summing(model)
    add(gradients, model(x).pow(2).mean(), 0.25)
    add(gradients, model(x).mean(), 0.5)
    assert_as_by_torch(model, lambda: 0.25 * model(x).pow(2).mean() + 0.5 * model(x).mean())


def test_several_roots_of_one_graph() -> None:
    model, x = model_of(3, 4), torch.randn(5, 3)
    gradients, out = summing(model), model(x)
    gradients.add((out.pow(2).mean(), out.sum()), (torch.tensor(2.0), torch.tensor(-1.0)))
    assert_as_by_torch(model, lambda: 2 * model(x).pow(2).mean() - model(x).sum())


def test_frozen_and_unused_parameters_get_none() -> None:
    used, frozen, unused = (nn.Linear(3, 1) for _ in range(3))
    frozen.requires_grad_(False)
    gradients, x = summing(used, frozen, unused), torch.randn(2, 3)
    add(gradients, (used(x) + frozen(x)).mean())
    found = gradients.filled([*used.parameters(), *frozen.parameters(), *unused.parameters()])
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in used.parameters()]


def test_a_graph_runs_once() -> None:
    model = model_of(2, 1)
    loss = model(torch.ones(1, 2)).pow(2).sum()
    add(summing(model), loss)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_hooks_run() -> None:
    model, seen = model_of(2, 1), []
    handle = model[0].weight.register_post_accumulate_grad_hook(seen.append)
    add(summing(model), model(torch.ones(1, 2)).sum())
    handle.remove()
    assert seen == [model[0].weight]


def test_sparse_gradients_are_coalesced_when_the_window_closes() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    gradients = summing(embedding)
    for _ in range(3):
        add(gradients, embedding(torch.tensor([1, 1, 3])).sum())
    [parameter] = gradients.filled(embedding.parameters())
    assert parameter.grad is not None
    assert parameter.grad.is_coalesced()
    assert parameter.grad.to_dense()[:, 0].tolist() == [0, 6, 0, 3, 0]


def test_cleared() -> None:
    model = model_of(2, 1)
    gradients = summing(model)
    add(gradients, model(torch.ones(1, 2)).sum())
    gradients.clear()
    assert grads(model) == [None, None]
    add(gradients, model(torch.ones(1, 2)).sum())  # a new window, not an old one that was touched


# ---------------------------------------------------------------------------------------------------- nothing left over
def test_a_gradient_that_is_left_over() -> None:
    model = model_of(3, 4, 1)
    model(torch.ones(2, 3)).sum().backward()
    message = (
        r"4 of 4 parameters have a .grad before the window's first micro-batch \(0.weight, 0.bias, 1.weight, ...\)"
    )
    with pytest.raises(ga.MisuseError, match=message + r".*Call optimizer.zero_grad\(\)"):
        summing(model).check_empty()
    assert None not in grads(model), "it is the user's, so it stays"


def test_a_sparse_gradient_that_is_left_over() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ga.MisuseError, match="1 of 1 parameters"):
        summing(embedding).check_empty()


@pytest.mark.parametrize("gradient", [float("nan"), -0.5], ids=["NaN", "negative"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_one_that_is_not_zero_is_named(gradient: float, frozen: bool) -> None:
    model = model_of(3, 4, 1).requires_grad_(not frozen)
    model[1].bias.grad = torch.tensor([gradient])
    with pytest.raises(ga.MisuseError, match=r"1 of 4 parameters have .* \(1.bias\)\."):
        summing(model).check_empty()


def test_gradients_of_zero_are_removed() -> None:
    """What ``zero_grad(set_to_none=False)`` leaves is no gradient."""
    model, embedding = model_of(3, 1), nn.Embedding(5, 2, sparse=True)
    (model(torch.ones(1, 3)).sum() + embedding(torch.tensor([1])).sum()).backward()
    for parameter in (*model.parameters(), *embedding.parameters()):
        assert parameter.grad is not None
        parameter.grad.zero_()
    summing(model, embedding).check_empty()
    assert grads(model) + grads(embedding) == [None] * 3


# -------------------------------------------------------------------------------------------------------- nobody else's
def replace(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 0.5


TOUCHES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "zero_grad": (nn.Module.zero_grad, "cleared"),
    "zero_grad in place": (lambda model: model.zero_grad(set_to_none=False), "changed"),
    "clip_grad_norm_": (lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3), "changed"),
    "clip_grad_value_": (lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3), "changed"),
    "backward": (lambda model: model(torch.ones(1, 2)).sum().backward(), "changed"),
    "replaced": (replace, "changed"),
}


@pytest.mark.parametrize("micro_batches_before", [1, 3])
@pytest.mark.parametrize(("touch", "what"), TOUCHES.values(), ids=TOUCHES.keys())
def test_touched_between_two_micro_batches(
    touch: Callable[[nn.Module], object], what: str, micro_batches_before: int
) -> None:
    model = model_of(2, 1)
    gradients = summing(model)
    for _ in range(micro_batches_before):
        add(gradients, model(torch.ones(1, 2)).sum())
    touch(model)
    with pytest.raises(ga.MisuseError, match=f"gradient of '0.weight' was {what}.* between two .*pass clip_norm="):
        add(gradients, model(torch.ones(1, 2)).sum())


def test_looking_is_not_touching() -> None:
    model = model_of(2, 1)
    gradients = summing(model)
    for _ in range(3):
        add(gradients, model(torch.ones(1, 2)).sum())
        assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())
    assert model[0].bias.grad == 3


def test_parameters_that_get_their_gradient_later() -> None:
    """The first micro-batch reaches the second layer only; the watch is on what has a gradient."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    gradients, x = summing(first, second), torch.ones(1, 2)
    add(gradients, second(x).sum())
    add(gradients, second(first(x)).sum())
    assert first.weight.grad is not None
    second.zero_grad()
    with pytest.raises(ga.MisuseError, match="was cleared"):
        add(gradients, second(x).sum())


# --------------------------------------------------------------------------------- other models that are passed through
def test_parameters_of_other_models_are_left_alone() -> None:
    generator, judge = model_of(2, 3), model_of(3, 1)
    gradients = summing(generator)
    add(gradients, judge(generator(torch.ones(4, 2))).mean())
    assert grads(judge) == [None, None]
    assert_as_by_torch(generator, lambda: judge(generator(torch.ones(4, 2))).mean())


def test_inputs_whose_gradient_is_wanted_get_it() -> None:
    model, x = model_of(2, 3, 1), torch.ones(1, 2, requires_grad=True)
    add(summing(model), model(x).sum())
    assert x.grad is not None


def test_the_look_can_be_repeated() -> None:
    own, other = model_of(2, 2), model_of(2, 2)
    gradients, x = summing(own), torch.ones(1, 2)
    for through_other in (True, False, True):
        add(gradients, (other(own(x)) if through_other else own(x)).sum())
        assert grads(other) == [None, None]


def test_nothing_to_train_here_writes_nowhere() -> None:
    own, other = model_of(2, 2).requires_grad_(False), model_of(2, 2)
    add(summing(own), other(own(torch.ones(1, 2))).sum())
    assert grads(other) == grads(own) == [None, None]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_ones_own_before_another_model(use_reentrant: bool) -> None:
    own, middle, other = model_of(2, 2), model_of(2, 2), model_of(2, 2)
    gradients = summing(own, middle)
    loss = other(checkpoint(middle, own(torch.ones(1, 2)), use_reentrant=use_reentrant)).sum()
    if use_reentrant:
        with pytest.raises(ga.UnsupportedError, match=r"reentrant checkpoint.*use_reentrant=False"):
            add(gradients, loss)
        return
    add(gradients, loss)
    assert None not in grads(own) + grads(middle)
    assert grads(other) == [None, None]


def test_a_reentrant_checkpoint_in_a_model_of_ones_own() -> None:
    own = model_of(2, 2, 2)
    add(summing(own), checkpoint(own[1], own[0](torch.ones(1, 2)), use_reentrant=True).sum())
    assert None not in grads(own)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("first_use", [0, 1])
def test_another_model_from_the_first_or_a_later_micro_batch_on(is_checkpointed: bool, first_use: int) -> None:
    generator, judge = nn.Linear(2, 2), nn.Linear(2, 1)
    accumulator = ga.Accumulator(generator, torch.optim.SGD(generator.parameters(), lr=0.1), micro_batches=2)
    for i, x in enumerate(accumulator.over([torch.randn(2, 2), torch.randn(2, 2)])):
        output = generator(x)
        if i >= first_use:
            output = checkpoint(judge, output, use_reentrant=False) if is_checkpointed else judge(output)
        accumulator.backward(ga.Loss.mean(output.mean(), over=2))
    assert accumulator.updates == 1
    assert judge.weight.grad is None


def test_another_model_behind_a_reentrant_checkpoint_is_refused() -> None:
    generator, judge = nn.Linear(2, 2), nn.Linear(2, 1)
    accumulator = ga.Accumulator(generator, torch.optim.SGD(generator.parameters(), lr=0.1), micro_batches=1)
    value = checkpoint(judge, generator(torch.ones(3, 2)), use_reentrant=True).mean()
    with pytest.raises(ga.UnsupportedError, match=r"reentrant checkpoint.*use_reentrant=False"):
        accumulator.backward(ga.Loss.mean(value, over=3))
    assert judge.weight.grad is None


# ---------------------------------------------------------------------------------------------- set aside, and put back
def test_put_back_adds_up() -> None:
    model, x = model_of(2, 1), torch.randn(3, 2)
    gradients = summing(model)
    model(x).sum().backward()
    aside = gradients.set_aside()
    assert grads(model) == [None, None]
    add(gradients, model(x).pow(2).mean())
    gradients.put_back(aside)
    assert_as_by_torch(model, lambda: model(x).sum() + model(x).pow(2).mean())


def test_put_back_is_the_users_own_tensor() -> None:
    """As torch's own backward would, which adds in place: a reference to the gradient stays one."""
    model = model_of(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = model[0].weight.grad
    gradients = summing(model)
    aside = gradients.set_aside()
    add(gradients, model(torch.ones(1, 2)).sum())
    gradients.put_back(aside)
    assert model[0].weight.grad is before
    assert before is not None
    assert before.tolist() == [[2, 2]]


@pytest.mark.parametrize("sparse_first", [True, False])
def test_put_back_sparse_and_dense(sparse_first: bool) -> None:
    weight = nn.Parameter(torch.ones(3, 2))

    def run(sparse: bool) -> Tensor:
        return nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum() if sparse else (2 * weight).sum()

    gradients = GradientSum([("weight", weight)])
    run(sparse_first).backward()
    aside = gradients.set_aside()
    add(gradients, run(not sparse_first))
    gradients.put_back(aside)
    assert weight.grad is not None
    assert weight.grad.to_dense().tolist() == [[2, 2], [3, 3], [2, 2]]
