"""Every loss of torch, taken apart, against the same loss over the whole batch in float64."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gradaccum.errors import UnsupportedError
from gradaccum.losses.criterion import criterion
from gradaccum.losses.torch_losses import HAS_LINEAR_CROSS_ENTROPY, RULES, rule_of, torch_class_of
from losses.torch_cases import (
    CASES,
    CLASS_WEIGHTS,
    CLASSES,
    DOUBLE,
    ROWS,
    Inputs,
    accumulated,
    classified,
    cut,
    forms,
    gradient,
    labels,
    output,
    positive,
    share,
)

# A gradient here is a sum of at most 1000 numbers of size 1 in float64, each off by 2**-53: 1000 * 2**-53 is 1e-13, and
# the whole batch is added up in another order, with an error of its own.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

SPLITS = {"ragged": (5, 0, 1, 7), "one by one": (1,) * ROWS}

EVERY_FORM = pytest.mark.parametrize(("name", "form"), [(name, form) for name in CASES for form in forms(CASES[name])])
NEEDS_LINEAR_CROSS_ENTROPY = pytest.mark.skipif(
    not HAS_LINEAR_CROSS_ENTROPY, reason="this torch has no LinearCrossEntropyLoss"
)


# Torch's own KL divergence, whenever it takes the mean over elements.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both:UserWarning")


def gradient_leaves(inputs: Inputs, loss: Any) -> list[Tensor]:
    parameters = list(loss.loss.parameters()) if isinstance(getattr(loss, "loss", None), nn.Module) else []
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad] + parameters


def whole_batch(name: str, form: str, loss: Any, inputs: Inputs) -> Tensor:
    """Torch's own mean."""
    case = CASES[name]
    if form != "class":
        assert case.function is not None
        return case.function(*inputs)
    result = loss.loss(*inputs)
    return result.loss if isinstance(loss.loss, nn.AdaptiveLogSoftmaxWithLoss) else result


def assert_accumulated(loss: Any, parts: list[Inputs], leaves: list[Tensor], expected: Tensor) -> None:
    value, gradients = accumulated(loss, parts, leaves)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(gradients, gradient(expected, leaves), **EXACT)


@pytest.mark.parametrize("split", SPLITS)
@EVERY_FORM
def test_micro_batches_add_up_to_the_whole_batch(name: str, form: str, split: str) -> None:
    case, loss = CASES[name], forms(CASES[name])[form]
    inputs = case.inputs(ROWS)
    expected = whole_batch(name, form, loss, inputs)
    assert_accumulated(loss, cut(inputs, SPLITS[split], case.rows_at), gradient_leaves(inputs, loss), expected)
    torch.testing.assert_close(loss(*inputs).value, expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "is_ignored"),
    [(name, False) for name in CASES] + [(name, True) for name, case in CASES.items() if case.depends_on_data],
)
def test_a_micro_batch_without_rows_or_of_ignored_targets_adds_exactly_nothing(name: str, is_ignored: bool) -> None:
    loss = criterion(CASES[name].module())
    inputs = CASES[name].inputs(3 if is_ignored else 0)
    if is_ignored:
        ignored = -100 if loss.loss.ignore_index is None else loss.loss.ignore_index
        inputs = (inputs[0], torch.full_like(inputs[1], ignored))
    leaves = gradient_leaves(inputs, loss)
    micro = loss(*inputs)
    assert micro.weight == 0
    assert micro.total == 0
    for leaf, slope in zip(leaves, torch.autograd.grad(micro.total, leaves, allow_unused=not is_ignored), strict=True):
        assert slope is None or torch.equal(slope, torch.zeros_like(leaf))
    assert micro.total.requires_grad


@EVERY_FORM
def test_weight_is_an_int_where_shapes_decide_it(name: str, form: str) -> None:
    case = CASES[name]
    weight = forms(case)[form](*case.inputs(4)).weight
    assert isinstance(weight, Tensor if case.depends_on_data else int)
    if isinstance(weight, Tensor):
        assert weight.dim() == 0
        assert not weight.requires_grad


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.reads_data])
def test_no_value_is_read_on_the_host(name: str) -> None:
    """Fake tensors have no values: reading one raises, as on a GPU it would wait."""
    loss = criterion(CASES[name].module())
    with FakeTensorMode(allow_non_fake_inputs=True):
        micro = loss(*CASES[name].inputs(4))
    assert isinstance(micro.total, FakeTensor)
    assert isinstance(micro.weight, (int, FakeTensor))


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in CASES for form in forms(CASES[name]) if hasattr(CASES[name].module(), "reduction")],
)
def test_a_sum_stays_a_sum(name: str, form: str) -> None:
    case = CASES[name]
    module = case.module()
    module.reduction = "sum"
    if form == "class":
        loss, expected = criterion(module), module
    else:
        function = case.function.func if isinstance(case.function, functools.partial) else case.function
        options = case.function.keywords if isinstance(case.function, functools.partial) else {}
        expected = functools.partial(function, **{**options, "reduction": "sum"})
        loss = criterion(expected) if form == "partial" else functools.partial(criterion(function), **expected.keywords)
    inputs = case.inputs(ROWS)
    leaves = [x for x in inputs if x.requires_grad]
    micro = loss(*inputs)
    assert micro.weight is None
    torch.testing.assert_close(micro.value, expected(*inputs), **EXACT)
    torch.testing.assert_close(gradient(micro.total, leaves), gradient(expected(*inputs), leaves), **EXACT)


def test_the_oracle_would_see_a_mean_of_means() -> None:
    loss = criterion(nn.CrossEntropyLoss())
    inputs = classified()(ROWS)
    means = [loss(*part).value for part in cut(inputs, (5, 8), (0, 0))]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.stack(means).mean(), F.cross_entropy(*inputs), **EXACT)


def test_every_loss_of_torch_is_a_case() -> None:
    classes = {value for name, value in vars(nn).items() if "Loss" in name and issubclass(value, nn.Module)}
    classes.remove(nn.NLLLoss2d)  # deprecated: it warns, and inherits everything from NLLLoss
    assert classes == {type(case.module()) for case in CASES.values()}


def test_every_functional_loss_of_torch_has_a_rule() -> None:
    functions = {
        value
        for name, value in vars(F).items()
        if inspect.isfunction(value) and "reduction" in inspect.signature(value).parameters and not name.startswith("_")
    }
    assert functions == set(RULES)


# Loss classes as calls of their functional forms.


class Overridden(nn.HuberLoss):
    def forward(self, input, target):  # type: ignore[no-untyped-def]
        return super().forward(input, target)


@pytest.mark.parametrize("name", CASES)
def test_a_module_passes_all_that_its_functional_form_requires_and_takes(name: str) -> None:
    """What the function can be told, and the module knows by the same name, is not left to a default."""
    module = CASES[name].module()
    rule = rule_of(module)
    assert rule is not None
    options, parameters = rule.options(module).keys(), rule.signature.parameters
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required <= options | set(rule.inputs)
    assert {name for name in parameters if hasattr(module, name)} <= options <= parameters.keys()
    assert len(rule.inputs) == len(rule.forward.parameters) - 1  # without self


def test_a_rule_belongs_to_a_forward() -> None:
    renamed: type[nn.HuberLoss] = type("Renamed", (nn.HuberLoss,), {})
    replaced = nn.HuberLoss()
    replaced.forward = lambda input, target: input  # pyright: ignore[reportAttributeAccessIssue]
    assert rule_of(renamed()) is rule_of(nn.HuberLoss()) is RULES[F.huber_loss]
    assert all(rule_of(module) is None for module in (Overridden(), nn.ReLU(), replaced))
    assert torch_class_of(Overridden()) is torch_class_of(nn.HuberLoss()) is nn.HuberLoss
    assert torch_class_of(nn.ReLU()) is None


# Cross entropy: every combination of its options.


@st.composite
def cross_entropies(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor, Tensor, list[int]]:
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    num_classes = draw(st.integers(1, 6))
    positions = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    options: dict[str, Any] = {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))}
    if draw(st.booleans()):
        options["weight"] = torch.rand(num_classes, dtype=DOUBLE) + 0.1
    logits = torch.randn(sum(sizes), num_classes, *positions, dtype=DOUBLE).requires_grad_()
    if draw(st.booleans()):
        return options, logits, torch.rand(logits.shape, dtype=DOUBLE), sizes
    options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, num_classes + 3]))
    target = torch.randint(0, num_classes, (sum(sizes), *positions))
    is_ignored = torch.rand(target.shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    return options, logits, target.masked_fill(is_ignored, options["ignore_index"]), sizes


@given(drawn=cross_entropies())
@settings(deadline=None, max_examples=120)
def test_cross_entropy_with_any_options_adds_up(drawn: tuple[dict[str, Any], Tensor, Tensor, list[int]]) -> None:
    options, logits, target, sizes = drawn
    loss = criterion(functools.partial(F.cross_entropy, **options))
    whole = loss(logits, target)
    if whole.weight == 0:
        assert whole.total == 0
        return
    expected = F.cross_entropy(logits, target, **options)
    assert_accumulated(loss, cut((logits, target), tuple(sizes), (0, 0)), [logits], expected)


def test_a_smoothed_target_of_a_class_without_weight_has_a_loss_and_no_weight() -> None:
    """Torch smooths over all classes but divides by the targets' weights: such a sum counts although it weighs 0."""
    loss = criterion(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.3))
    logits, target = output(4, CLASSES), torch.tensor([0, 1, 2, 2])
    first, second = loss(logits[:2], target[:2]), loss(logits[2:], target[2:])
    assert second.weight == 0
    assert second.total > 0
    torch.testing.assert_close((first.total + second.total) / first.weight, loss.loss(logits, target), **EXACT)


def test_a_byte_is_never_the_negative_index_that_is_ignored() -> None:
    logits, target = output(3, 200), torch.tensor([156, 1, 2], dtype=torch.uint8)  # 156 is -100 in eight bits
    micro = criterion(nn.NLLLoss())(logits, target)
    assert micro.weight == 3
    torch.testing.assert_close(micro.value, F.nll_loss(logits, target), **EXACT)


@pytest.mark.parametrize(
    ("loss", "inputs", "weight"),
    [
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), lambda: (output(CLASSES), torch.tensor(1)), 2.0),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), lambda: (output(CLASSES), share(CLASSES)), 1),
        (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: (output(CLASSES), torch.tensor(1)), 1),
        (nn.NLLLoss(), lambda: (output(CLASSES), torch.tensor(1)), 1),
        (nn.MultiMarginLoss(), lambda: (output(CLASSES), torch.tensor(1)), 1),
        (nn.MultiLabelMarginLoss(), lambda: (output(3), torch.tensor([1, -1, 0])), 1),
        (nn.CosineEmbeddingLoss(), lambda: (output(3), output(3), torch.tensor(1)), 1),
        (nn.TripletMarginLoss(), lambda: (output(3), output(3), output(3)), 1),
        (nn.KLDivLoss(reduction="batchmean"), lambda: (output(), share()), 1),
        (nn.MSELoss(), lambda: (output(), output()), 1),
        (nn.CTCLoss(), lambda: (output(9, CLASSES), torch.tensor([1, 2, 1]), (9,), (3,)), 1),
        (CASES["AdaptiveLogSoftmaxWithLoss"].module(), lambda: (output(8), torch.tensor(17)), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_one_sample_without_a_batch(loss: nn.Module, inputs: Callable[[], Inputs], weight: float) -> None:
    given = inputs()
    micro, expected = criterion(loss)(*given), loss(*given)
    assert micro.weight == weight
    torch.testing.assert_close(micro.value, getattr(expected, "loss", expected), **EXACT)


# CTC: lengths and targets come in several shapes.


@pytest.mark.parametrize("lengths_as", [lambda x: x, lambda x: tuple(x.tolist())], ids=["tensor", "tuple"])
def test_ctc_takes_concatenated_targets_and_lengths_of_any_kind(lengths_as: Callable[[Tensor], Any]) -> None:
    loss = criterion(nn.CTCLoss())
    x, lengths = output(9, 3, CLASSES), torch.tensor([2, 0, 4])
    targets, steps = torch.randint(1, CLASSES, (6,)), torch.tensor([9, 8, 9])
    expected = nn.CTCLoss()(x, targets, lengths_as(steps), lengths_as(lengths))
    first = loss(x[:, :2], targets[:2], lengths_as(steps[:2]), lengths_as(lengths[:2]))
    last = loss(x[:, 2:], targets[2:], lengths_as(steps[2:]), lengths_as(lengths[2:]))
    assert (first.weight, last.weight) == (2, 1)
    torch.testing.assert_close((first.total + last.total) / 3, expected, **EXACT)


@NEEDS_LINEAR_CROSS_ENTROPY
@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "chunks"])
def test_linear_cross_entropy_as_a_function(chunk: int | None) -> None:
    options = None if chunk is None else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    x, target, matrix = output(ROWS, 6), labels(ROWS), output(CLASSES, 6)
    call = functools.partial(F.linear_cross_entropy, weight=CLASS_WEIGHTS, options=options)
    parts = cut((x, target), SPLITS["ragged"], (0, 0))
    expected = call(x, matrix, target)
    assert_accumulated(lambda x, target: criterion(call)(x, matrix, target), parts, [x, matrix], expected)


# Weights of elements, which only the functional forms of three losses take.


@pytest.mark.parametrize(
    ("function", "depends_on_data"), [(F.l1_loss, True), (F.mse_loss, True), (F.huber_loss, False)]
)
def test_weights_of_elements(function: Callable[..., Tensor], depends_on_data: bool) -> None:
    x, y, weight = output(ROWS, 3), torch.randn(ROWS, 3, dtype=DOUBLE), share(ROWS, 3)
    loss = criterion(function)
    parts = cut((x, y, weight), (5, 0, 8), (0, 0, 0))
    assert_accumulated(lambda x, y, w: loss(x, y, weight=w), parts, [x], function(x, y, weight=weight))
    assert isinstance(loss(x, y, weight=weight).weight, Tensor if depends_on_data else int)


def test_weights_of_elements_that_learn_are_refused() -> None:
    x, weight = output(3, 2), positive(3, 2)
    with pytest.raises(UnsupportedError, match=r"requires a gradient, and torch divides by its sum.*weight.detach\(\)"):
        criterion(F.mse_loss)(x, torch.zeros(3, 2, dtype=DOUBLE), weight=weight)
    assert criterion(F.mse_loss)(x, torch.zeros_like(x), weight=weight, reduction="sum").total.requires_grad


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("function", [F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss])
def test_the_mean_is_over_what_was_broadcast(function: Callable[..., Tensor]) -> None:
    x, y = output(4, 1), torch.randn(4, 3, dtype=DOUBLE)
    micro = criterion(function)(x, y)
    assert micro.weight == 12
    torch.testing.assert_close(micro.value, function(x, y), **EXACT)


# Low precision.


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (nn.MSELoss(), lambda: (torch.full((40_000, 2), 2.0), torch.zeros(40_000, 2))),
        (nn.CrossEntropyLoss(), lambda: (torch.zeros(70_000, 8), torch.zeros(70_000, dtype=torch.long))),
        (nn.BCEWithLogitsLoss(), lambda: (torch.full((70_000,), 3.0), torch.zeros(70_000))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_float16_sum_beyond_65504_is_finite(loss: nn.Module, inputs: Callable[[], Inputs]) -> None:
    x, y = (value.half() if value.is_floating_point() else value for value in inputs())
    x.requires_grad_()
    micro = criterion(loss)(x, y)
    assert micro.total > 65504
    # Each loss is rounded to float16: 2**-11. Torch's own mean of the 70,000 cross entropies is inf / inf.
    expected = loss(x.float(), y.float() if y.is_floating_point() else y)
    torch.testing.assert_close(micro.value, expected, rtol=2**-10, atol=0)
    assert torch.autograd.grad(micro.value, x)[0].isfinite().all()


@NEEDS_LINEAR_CROSS_ENTROPY
def test_linear_cross_entropy_in_chunks_of_float16() -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=1000)
    loss = nn.LinearCrossEntropyLoss(4, 4, options=options, dtype=torch.float16)
    nn.init.zeros_(loss.linear.weight)
    x = torch.ones(90_000, 4, dtype=torch.float16)
    micro = criterion(loss)(x, torch.zeros(90_000, dtype=torch.long))
    assert micro.total > 65504
    (micro.total / micro.weight).backward()
    # Every row pushes its own class up by 3/4 and the three others down by 1/4; float16 holds 11 bits.
    expected = torch.tensor([[-0.75], [0.25], [0.25], [0.25]]).expand(4, 4)
    torch.testing.assert_close(loss.linear.weight.grad.float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_low_precision_are_counted_in_float32(dtype: torch.dtype) -> None:
    loss = criterion(nn.CrossEntropyLoss(weight=torch.ones(2, dtype=dtype)))
    micro = loss(torch.zeros(1025, 2, dtype=dtype), torch.zeros(1025, dtype=torch.long))
    assert micro.weight.dtype == torch.float32
    assert micro.weight == 1025  # bfloat16 goes on from 1024 to 1032, float16 from 2048 to 2050


def test_a_sum_of_bfloat16_losses_stays_what_it_is() -> None:
    x, target = torch.randn(64, CLASSES, dtype=torch.bfloat16), labels(64)
    micro, expected = criterion(nn.CrossEntropyLoss())(x, target), F.cross_entropy(x, target)
    assert micro.total.dtype == micro.value.dtype == expected.dtype == torch.bfloat16
    # Sum, count and quotient are each rounded to eight bits, and so are the parts of torch's own sum.
    torch.testing.assert_close(micro.value, expected, rtol=2**-6, atol=0)


def test_autocast_computes_what_torch_computes() -> None:
    model, loss = nn.Linear(4, CLASSES), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.float())
    x, target = torch.randn(64, 4), labels(64)
    with torch.autocast("cpu", torch.bfloat16):
        micro, expected = criterion(loss)(model(x), target), loss(model(x), target)
    torch.testing.assert_close(micro.value.float(), expected.float(), rtol=2**-8, atol=0)
    assert micro.value.dtype == expected.dtype
