"""Seeds times correction is the exact mean, however the weights fall and whatever was expected of them."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradaccum as ga
from gradaccum.losses.normaliser import SINGLE, Normaliser

FP64 = 1e-12  # a few roundings of 1e-16 each, over at most 8 micro-batches
FP32 = 1e-6  # a few of 6e-8

weights_of_micro_batches = st.one_of(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=8),
).filter(any)
as_given: dict[str, Callable[[float], Any]] = {
    "number": lambda weight: weight,
    "float": float,
    "tensor": torch.tensor,
    "fp64 tensor": lambda weight: torch.tensor(weight, dtype=torch.float64),
}


def leaf(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones((), dtype=dtype, requires_grad=True)


def add(normaliser: Normaliser, losses: ga.Loss | Mapping[str, ga.Loss]) -> list[tuple[Tensor, Tensor]]:
    """What an accumulation does with a micro-batch: its seeds, and the backward that starts with them."""
    found = normaliser.seeds({SINGLE: losses} if isinstance(losses, ga.Loss) else losses)
    rescale = normaliser.take_rescale()
    if found:
        roots, seeds = zip(*found, strict=True)
        if rescale is not None:
            leaf_of(roots[0]).grad *= rescale  # type: ignore[operator]
        torch.autograd.backward(roots, seeds)
    return found


def leaf_of(root: Tensor) -> Tensor:
    node: Any = root.grad_fn
    while not hasattr(node, "variable"):
        node = next(parent for parent, _ in node.next_functions if parent is not None)
    return node.variable


def corrected(parameter: Tensor, normaliser: Normaliser) -> float:
    assert parameter.grad is not None
    correction = normaliser.correction
    return float(parameter.grad if correction is None else parameter.grad * correction)


def loss_of(parameter: Tensor, slope: float, weight: Any, *, is_mean: bool) -> ga.Loss:
    """A mean of ``slope * parameter`` over ``weight`` items; NaN where there are none, as torch has it."""
    if is_mean:
        value = slope * parameter if float(weight) else parameter * float("nan")
        return ga.Loss.mean(value, over=weight)
    return ga.Loss.sum(slope * parameter * float(weight), over=weight)


# ------------------------------------------------------------------------------------------- the mean, whatever happens
@given(
    weights=weights_of_micro_batches,
    kind=st.sampled_from(sorted(as_given)),
    is_mean=st.booleans(),
    first_share=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    at_least=st.sampled_from([0.0, 1.0, 1e4]),
    known=st.booleans(),
    data=st.data(),
)
def test_the_gradient_and_the_loss_are_the_whole_batchs(
    weights: list[float],
    kind: str,
    is_mean: bool,
    first_share: tuple[int, int],
    at_least: float,
    known: bool,
    data: st.DataObject,
) -> None:
    slopes = data.draw(st.lists(st.floats(-9, 9), min_size=len(weights), max_size=len(weights)))
    given_as = [as_given[kind](weight) for weight in weights]
    exact = [float(weight) for weight in given_as]  # a tensor rounds to fp32
    total = math.fsum(exact)
    mean = math.fsum(w * s for w, s in zip(exact, slopes, strict=True)) / total
    parameter = leaf()
    normaliser = Normaliser(
        totals={SINGLE: total} if known else None, first_share=first_share, at_least=0.0 if known else at_least
    )
    for slope, weight in zip(slopes, given_as, strict=True):
        add(normaliser, loss_of(parameter, slope, weight, is_mean=is_mean))
    normaliser.check_totals()
    assert corrected(parameter, normaliser) == pytest.approx(mean, rel=FP64, abs=FP64)
    assert normaliser.means()[SINGLE].item() == pytest.approx(mean, rel=FP64, abs=FP64)
    assert normaliser.weight == pytest.approx(total)
    assert not normaliser.is_empty


@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), data=st.data())
def test_means_and_sums_of_one_window_mix(weights: list[int], data: st.DataObject) -> None:
    parameter, normaliser = leaf(), Normaliser(first_share=(1, len(weights)))
    for weight in weights:
        add(normaliser, loss_of(parameter, 3.0, weight, is_mean=data.draw(st.booleans())))
    assert corrected(parameter, normaliser) == pytest.approx(3.0, rel=FP64)


# ----------------------------------------------------------------------------------------------------- what is expected
def test_a_whole_number_on_a_device_is_not_divided_in_fp32() -> None:
    """torch's int64 / int64 is fp32. A tensor without data stands for one on a device: neither is read."""
    normaliser = Normaliser(first_share=(1, 3))
    normaliser.seeds({SINGLE: ga.Loss.sum(leaf().to("meta"), over=torch.tensor(7, device="meta"))})
    assert isinstance(normaliser.correction, Tensor)
    assert normaliser.correction.dtype == torch.float64


@pytest.mark.parametrize(
    ("first_share", "weights", "gradient", "correction"),
    [
        pytest.param((5, 13), [5, 5, 3], 2, None, id="13 rows as 5 + 5 + 3: the first is 5 / 13 of them"),
        pytest.param((1, 4), [5], 0.5, 4, id="a short window: a quarter of what was expected"),
        pytest.param((1, 2), [0, 5], 1, 2, id="the first that weighs something sets the expectation"),
    ],
)
def test_what_is_expected(
    first_share: tuple[int, int], weights: list[int], gradient: float, correction: float | None
) -> None:
    parameter, normaliser = leaf(), Normaliser(first_share=first_share)
    for weight in weights:
        add(normaliser, loss_of(parameter, 2, weight, is_mean=True))
    assert parameter.grad == gradient
    assert normaliser.correction == correction


def test_at_least_the_total_of_the_window_before() -> None:
    """A first micro-batch of one token would expect a total of 2, and the 999 to come would be seeded with 500."""
    parameter, normaliser = leaf(torch.float16), Normaliser(first_share=(1, 2), at_least=1000.0)
    for tokens in (1, 999):
        for _, seed in add(normaliser, ga.Loss.mean(parameter * 300, over=tokens)):
            assert seed <= 1
    assert normaliser.correction == 1.024, "a power of two was expected"
    assert corrected(parameter, normaliser) == 300


def test_what_is_added_up_stays_of_the_means_size() -> None:
    """64 gradients of 30,000: a sum, to be divided at the end, would overflow fp16 at the third."""
    parameter, normaliser = leaf(torch.float16), Normaliser(first_share=(1, 64))
    for _ in range(64):
        add(normaliser, ga.Loss.mean(parameter * 30000, over=8))
    assert normaliser.correction is None
    assert parameter.grad == pytest.approx(30000, rel=64 * 2**-11)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_seeds_are_exact(half: torch.dtype) -> None:
    """7 of 37 rows is off by 0.1% in bf16, and 3 of 37 by something else: each micro-batch would get another share."""
    normaliser, exact = Normaliser(first_share=(7, 37)), []
    for rows in (7, 3, 27):
        [(root, seed)] = add(normaliser, ga.Loss.mean(leaf(half) * 2, over=rows))
        assert root.dtype == seed.dtype == half
        exact.append(seed.double().item() * 64)
    assert exact == [7, 3, 27]
    assert normaliser.correction == 64 / 37


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_is_only_reported_is_not_rounded_to_half(half: torch.dtype) -> None:
    normaliser = Normaliser()
    for value in (1.0, 2.0, 2.0):
        add(normaliser, ga.Loss.mean(leaf(half) * value, over=1))
    mean = normaliser.means()[SINGLE]
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(5 / 3, rel=FP32)


def test_a_seed_is_never_the_gradient_itself() -> None:
    """A root that is a leaf gets its seed as .grad, which is added to in place."""
    parameter = leaf()
    for _ in range(3):
        add(Normaliser(), ga.Loss.mean(parameter, over=4))
    assert parameter.grad == 3


# ------------------------------------------------------------------------------------------------------------- the mean
def test_losses_are_added_up_in_fp64() -> None:
    """1 + 4,096 x 1e-8: in fp32 every one of the small ones would be lost."""
    normaliser = Normaliser()
    parameter = leaf(torch.float32)
    for value in [1.0] + [1e-8] * 4096:
        normaliser.seeds({SINGLE: ga.Loss.sum(parameter * value, over=1)})
    exact = (1 + 4096e-8) / 4097
    assert normaliser.means()[SINGLE].item() == pytest.approx(exact, rel=2**-24)
    assert normaliser.means()[SINGLE].dtype == torch.float32


def test_a_window_of_nothing() -> None:
    parameter, normaliser = leaf(), Normaliser(first_share=(1, 2))
    for _ in range(2):
        assert add(normaliser, ga.Loss.mean(parameter * float("nan"), over=0)) == []
    assert parameter.grad is None
    assert normaliser.is_empty
    assert normaliser.correction is None
    assert normaliser.weight == 0
    assert normaliser.means()[SINGLE].isnan()


@pytest.mark.parametrize("order", [(0, 4), (4, 0)])
def test_a_sum_over_nothing_may_have_a_gradient(order: tuple[int, int]) -> None:
    """Labels that are smoothed onto other classes, while their own has no weight: torch's whole batch counts it too."""
    parameter, normaliser = leaf(), Normaliser(first_share=(1, 2))
    for weight in order:
        add(normaliser, ga.Loss.sum(parameter * 6, over=weight))
    assert corrected(parameter, normaliser) == 12 / 4
    assert normaliser.means()[SINGLE] == 12 / 4


def test_nan_is_not_hidden() -> None:
    parameter, normaliser = leaf(), Normaliser()
    add(normaliser, ga.Loss.mean(parameter * float("nan"), over=3))
    assert normaliser.means()[SINGLE].isnan()
    assert math.isnan(corrected(parameter, normaliser))


def test_a_sum_is_divided_by_nothing() -> None:
    parameter, normaliser = leaf(), Normaliser(first_share=(1, 2))
    for slope in (2.0, 3.0):
        add(normaliser, ga.Loss.sum(parameter * slope))
    assert corrected(parameter, normaliser) == 5
    assert normaliser.means()[SINGLE] == 5
    assert normaliser.weight is None
    assert not normaliser.is_empty


def test_a_sum_is_divided_by_nothing_also_where_totals_are_known() -> None:
    parameter, normaliser = leaf(), Normaliser(totals={"lm": 4, "penalty": 10})
    add(normaliser, {"lm": ga.Loss.sum(parameter * 8, over=4), "penalty": ga.Loss.sum(parameter * 3)})
    normaliser.check_totals()
    assert corrected(parameter, normaliser) == pytest.approx(2 + 3)
    assert {name: mean.item() for name, mean in normaliser.means().items()} == {"lm": 2, "penalty": 3}
    assert normaliser.weight == {"lm": 4}


class Held:
    pass


def test_what_is_reported_keeps_no_graph_alive() -> None:
    normaliser, root, held = Normaliser(), leaf() * 3, Held()
    assert root.grad_fn is not None
    root.grad_fn.metadata["held"] = held
    alive = weakref.ref(held)
    normaliser.seeds({SINGLE: ga.Loss.sum(root, over=2)})
    del root, held
    assert alive() is None
    assert not normaliser.means()[SINGLE].requires_grad


# -------------------------------------------------------------------------------------------------------- several terms
@given(
    weights=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6).filter(
        lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs)
    )
)
def test_each_term_is_divided_by_its_own_total(weights: Sequence[tuple[int, int]]) -> None:
    parameter = leaf()
    totals = {"lm": sum(a for a, _ in weights), "aux": sum(b for _, b in weights)}
    normaliser = Normaliser(totals=totals)
    for lm, aux in weights:
        terms = {"lm": loss_of(parameter, 3.0, lm, is_mean=True), "aux": loss_of(parameter, 0.5, aux, is_mean=False)}
        add(normaliser, terms)
    normaliser.check_totals()
    assert corrected(parameter, normaliser) == pytest.approx(3.5, rel=FP64)
    assert normaliser.weight == totals
    assert normaliser.means()["lm"].item() == pytest.approx(3.0, rel=FP64)
    assert normaliser.means()["aux"].item() == pytest.approx(0.5, rel=FP64)


def test_terms_of_one_weight_need_no_totals() -> None:
    parameter, normaliser = leaf(), Normaliser(first_share=(1, 2))
    for tokens in (5, 8):
        terms = {"lm": ga.Loss.mean(parameter * 3, over=tokens), "z": ga.Loss.sum(parameter * tokens, over=tokens)}
        add(normaliser, terms)
    assert corrected(parameter, normaliser) == pytest.approx(4, rel=FP64)
    assert normaliser.weight == 13


@pytest.mark.parametrize(
    ("totals", "aux", "message"),
    [
        (None, 2, r"different things \('lm' over 7, 'aux' over 2\).*weights=lambda batch: {\"lm\": ..., \"aux\": ...}"),
        (None, None, r"\('lm' over 7, 'aux' over nothing\)"),
        ({"lm": 7}, 2, r"gave the total of 'lm', and the loss returned 'lm', 'aux'.*the term 'aux' cannot be divided"),
    ],
    ids=["different weights", "a sum beside a mean", "a term without a total"],
)
def test_terms_that_need_totals(totals: dict[str, int] | None, aux: int | None, message: str) -> None:
    terms = {"lm": ga.Loss.mean(leaf() * 1, over=7), "aux": ga.Loss.sum(leaf() * 1, over=aux)}
    with pytest.raises(ga.LossError, match=message):
        Normaliser(totals=totals).seeds(terms)


def test_terms_that_change_within_a_window() -> None:
    normaliser = Normaliser(totals={"lm": 7, "aux": 3})
    normaliser.seeds({"lm": ga.Loss.mean(leaf() * 1, over=7)})
    with pytest.raises(ga.LossError, match=r"terms 'aux', and earlier micro-batches of this window had 'lm'.*weight 0"):
        normaliser.seeds({"aux": ga.Loss.mean(leaf() * 1, over=3)})


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: {"lm": ga.Loss.mean(leaf() * 1, over=3)}, "a single loss, another a dict of terms"),
        (lambda: ga.Loss.sum(leaf() * 1), "a sum without `over`, another a loss that has a weight"),
    ],
    ids=["a dict", "a sum"],
)
def test_a_mean_does_not_go_with(other: Callable[[], Any], message: str, is_turned: bool) -> None:
    normaliser, losses = Normaliser(), [ga.Loss.mean(leaf() * 1, over=3), other()]
    add(normaliser, losses[is_turned])
    with pytest.raises(ga.LossError, match=message):
        add(normaliser, losses[not is_turned])


@pytest.mark.parametrize(("name", "what"), [(SINGLE, "loss"), ("lm", "term 'lm'")])
def test_totals_that_the_micro_batches_do_not_add_up_to(name: str, what: str) -> None:
    normaliser = Normaliser(totals={name: 20})
    normaliser.seeds({name: ga.Loss.mean(leaf() * 1, over=15)})
    message = f"total weight of the {what} was given as 20, .* add up to 15, .* 0.75 times"
    with pytest.raises(ga.LossError, match=message):
        normaliser.check_totals()


def test_totals_may_differ_by_the_rounding_of_fp32_class_weights() -> None:
    normaliser = Normaliser(totals={SINGLE: 20.000001})
    normaliser.seeds({SINGLE: ga.Loss.mean(leaf() * 1, over=20)})
    normaliser.check_totals()


def test_a_total_of_zero_and_a_micro_batch_that_weighs_something() -> None:
    normaliser = Normaliser(totals={SINGLE: 0})
    with pytest.raises(ga.LossError, match=r"a total of 0 for the loss, and one of its micro-batches weighs 3\..*by 0"):
        normaliser.seeds({SINGLE: ga.Loss.mean(leaf() * 1, over=3)})


def test_a_total_of_zero_and_nothing_that_weighs() -> None:
    normaliser = Normaliser(totals={"lm": 6, "experts": 0})
    parameter = leaf()
    for _ in range(2):
        add(normaliser, {"lm": ga.Loss.mean(parameter * 5, over=3), "experts": ga.Loss.sum(parameter * 0, over=0)})
    normaliser.check_totals()
    assert corrected(parameter, normaliser) == 5
    assert normaliser.means()["experts"].isnan()
    assert not normaliser.is_empty
