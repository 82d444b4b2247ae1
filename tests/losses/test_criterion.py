"""What `criterion` takes, what it refuses, and what it leaves alone."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.errors import UnknownLossError
from gradaccum.losses.criterion import Criterion, criterion
from gradaccum.losses.loss import Loss

LOGITS = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
LABELS = torch.tensor([0, 1, -100])


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Named(nn.CrossEntropyLoss):
    """Changes the defaults, and not what is computed."""

    def __init__(self) -> None:
        super().__init__(ignore_index=1)


def replaced() -> nn.Module:
    module = nn.MSELoss()
    module.forward = lambda input, target: input.mean()  # pyright: ignore[reportAttributeAccessIssue]
    return module


def my_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    def __repr__(self) -> str:
        return "Unhashable()"


UNKNOWN: dict[str, tuple[Any, str]] = {
    "subclass with a forward": (Focal(), r"Focal has a forward of its own, .* whatever CrossEntropyLoss does\."),
    "forward that was replaced": (replaced(), r"MSELoss has a forward of its own"),
    "other module": (nn.Linear(2, 2), r"got Linear\(.*\), which is no loss of torch\.nn"),
    "own function": (my_loss, r"got my_loss, which is no loss of torch\.nn and no functional form"),
    "lambda": (lambda output, target: output.mean(), r"got .*<lambda>, which is no loss"),
    "partial of an own function": (functools.partial(my_loss, target=0), r"got partial\(my_loss, target=0\), which"),
    "method of torch": (torch.kl_div, r"got <built-in method kl_div .*>, which is no loss"),
    "callable that cannot be a key": (Unhashable(), r"got Unhashable\(\), which is no loss"),
    "nothing": (None, r"got None, which is no loss"),
    "name": ("mse_loss", r"got 'mse_loss', which is no loss"),
    "list": ([1], r"got \[1\], which is no loss"),
    "criterion": (criterion(nn.MSELoss()), r"got ga\.criterion\(MSELoss\(\)\), which is no loss"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_loss_is_refused_when_it_is_handed_over(name: str) -> None:
    loss, happened = UNKNOWN[name]
    with pytest.raises(UnknownLossError, match=happened) as refused:
        criterion(loss)
    assert isinstance(refused.value, TypeError)
    assert "gradients would not add up to the whole batch's" in str(refused.value)
    assert "ga.Loss.sum(losses.sum(), over=losses.numel())" in str(refused.value)
    assert "ga.Loss.mean(value, over=n)" in str(refused.value)


NONE = r"reduction='none' leaves one loss for each item.*reduction='mean' or 'sum'.*over=losses\.numel\(\)"
NOT_KNOWN = r"mse_loss with reduction='{}' is not known.*'mean' or 'sum'"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss, r"the class CrossEntropyLoss itself.*ga\.criterion\(CrossEntropyLoss\(\.\.\.\)\)"),
        (nn.CrossEntropyLoss(reduction="none"), NONE),
        (nn.CTCLoss(reduction="none"), NONE),
        (functools.partial(F.mse_loss, reduction="none"), NONE),
        *((nn.MSELoss(reduction=name), NOT_KNOWN.format(name)) for name in ("batchmean", "elementwise_mean", "median")),
        (nn.KLDivLoss(reduction="none"), "Use reduction='mean' or 'batchmean' or 'sum'"),
    ],
    ids=["class", "cross entropy", "ctc", "functional", "batchmean", "elementwise_mean", "median", "kl"],
)
def test_classes_and_reductions_that_are_refused_when_they_are_handed_over(loss: Any, message: str) -> None:
    with pytest.raises(UnknownLossError, match=message):
        criterion(loss)


def changed() -> Loss:
    module = nn.CrossEntropyLoss()
    made = criterion(module)
    module.reduction = "none"
    return made(LOGITS, LABELS)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda: criterion(F.cross_entropy)(LOGITS, LABELS, reduction="none"),
        changed,
        lambda: criterion(nn.MSELoss(reduce=False)),
        lambda: criterion(F.mse_loss)(LOGITS, LOGITS, reduce=False),
    ],
    ids=["at the call", "changed since", "deprecated", "deprecated, at the call"],
)
def test_unreduced_losses_are_refused_where_that_tells(call: Callable[[], object]) -> None:
    with pytest.raises(UnknownLossError, match=NONE):
        call()


# The arguments that stood for the reduction before there was one.


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize(
    ("legacy", "weight"),
    [({"size_average": True}, 6), ({"size_average": False}, None), ({"reduce": True}, 6), ({"reduction": "sum"}, None)],
    ids=str,
)
def test_deprecated_arguments_mean_what_torch_takes_them_for(legacy: dict[str, Any], weight: int | None) -> None:
    target = torch.zeros_like(LOGITS)
    for loss in (
        criterion(nn.MSELoss(**legacy)),
        criterion(functools.partial(F.mse_loss, **legacy)),
        functools.partial(criterion(F.mse_loss), **legacy),
    ):
        micro = loss(LOGITS, target)
        assert micro.weight == weight
        torch.testing.assert_close(micro.value, F.mse_loss(LOGITS, target, **legacy))


def test_deprecated_arguments_warn_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        criterion(F.mse_loss)(LOGITS, LOGITS, size_average=True)


def test_kl_div_divides_twice_and_is_refused() -> None:
    shares = LOGITS.softmax(1)
    with pytest.warns(UserWarning, match="size_average"):
        twice = F.kl_div(shares.log(), shares.flip(0), reduction="batchmean", size_average=True)
    torch.testing.assert_close(twice, F.kl_div(shares.log(), shares.flip(0), reduction="batchmean") / shares.numel())
    with pytest.raises(UnknownLossError, match=r"'batchmean' together with size_average=True.*Leave size_average out"):
        criterion(F.kl_div)(shares.log(), shares, reduction="batchmean", size_average=True)


# How it is called.


def test_a_subclass_that_inherits_forward_is_the_same_loss() -> None:
    assert criterion(Named())(LOGITS, LABELS.clamp_min(0)).weight == 2


def test_the_deprecated_name_of_nll_is_nll() -> None:
    with pytest.warns(FutureWarning, match="NLLLoss2d"):
        module = nn.NLLLoss2d()
    assert criterion(module)(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)).weight == 9


IGNORES_0 = functools.partial(F.cross_entropy, ignore_index=0)
CALLS: dict[str, Callable[[], Loss]] = {
    "module": lambda: criterion(nn.CrossEntropyLoss())(LOGITS, LABELS),
    "module by name": lambda: criterion(nn.CrossEntropyLoss())(target=LABELS, input=LOGITS),
    "function": lambda: criterion(F.cross_entropy)(LOGITS, LABELS),
    "function by name": lambda: criterion(F.cross_entropy)(target=LABELS, input=LOGITS),
    "option by position": lambda: criterion(F.cross_entropy)(LOGITS, LABELS, None),
    "partial": lambda: criterion(functools.partial(F.cross_entropy, ignore_index=7))(LOGITS[:2], LABELS[:2]),
    "partial by position": lambda: criterion(functools.partial(F.cross_entropy, LOGITS))(LABELS),
    "partial of a partial": lambda: criterion(functools.partial(IGNORES_0, ignore_index=-100))(LOGITS, LABELS),
    "overridden at the call": lambda: criterion(IGNORES_0)(LOGITS, LABELS, ignore_index=-100),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_and_options_go_where_torch_puts_them(name: str) -> None:
    micro = CALLS[name]()
    assert micro.weight == 2
    torch.testing.assert_close(micro.value, F.cross_entropy(LOGITS[:2], LABELS[:2]))


def test_an_option_at_the_call_counts() -> None:
    assert criterion(F.cross_entropy)(LOGITS, LABELS.clamp_min(0), ignore_index=0).weight == 1


def test_an_input_whose_name_is_an_option_of_the_function() -> None:
    """PoissonNLLLoss.forward calls its input log_input; for F.poisson_nll_loss that is a bool."""
    rates = LOGITS.abs()
    micro = criterion(nn.PoissonNLLLoss(log_input=False))(target=rates, log_input=rates)
    torch.testing.assert_close(micro.value, nn.PoissonNLLLoss(log_input=False)(rates, rates))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), F.cross_entropy], ids=["CE", "MSE", "function"])
def test_inputs_that_do_not_fit_are_the_error_that_python_raises(loss: Any) -> None:
    for inputs, options, message in (
        ([LOGITS], {}, "missing a required argument: 'target'"),
        ([LOGITS] * 9, {}, "too many positional arguments"),
        ([LOGITS, LABELS], {"ignored": 0}, "unexpected keyword argument 'ignored'"),
    ):
        with pytest.raises(TypeError, match=message):
            criterion(loss)(*inputs, **options)


# What it leaves alone.


def test_a_module_stays_as_it_was_and_is_read_at_every_call() -> None:
    module = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    made = criterion(module)
    assert made(LOGITS, LABELS).weight == 4
    assert module.reduction == "mean"
    assert module(LOGITS, LABELS).dim() == 0
    module.to(torch.float64)
    assert made(LOGITS.double(), LABELS).weight.dtype == torch.float64
    module.to(torch.float32)
    module.weight = torch.tensor([1.0, 5.0])
    module.ignore_index = 1
    assert made(LOGITS, LABELS.clamp_min(0)).weight == 2
    module.reduction = "sum"
    assert made(LOGITS, LABELS.clamp_min(0)).weight is None


def test_options_of_a_partial_are_not_used_up() -> None:
    call = functools.partial(F.cross_entropy, ignore_index=1, reduction="sum")
    made = criterion(call)
    made(LOGITS, LABELS.clamp_min(0))
    made(LOGITS, LABELS.clamp_min(0))
    assert call.keywords == {"ignore_index": 1, "reduction": "sum"}


def test_parameters_of_a_loss_get_their_gradient() -> None:
    module = nn.AdaptiveLogSoftmaxWithLoss(2, 6, [2, 4], div_value=1.0)
    criterion(module)(LOGITS, torch.tensor([0, 3, 5])).total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    made = criterion(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(other, Criterion)
        assert other(LOGITS, LABELS).weight == 4


@pytest.mark.parametrize(
    ("loss", "written"),
    [
        (nn.HuberLoss(), "ga.criterion(HuberLoss())"),
        (F.huber_loss, "ga.criterion(F.huber_loss)"),
        (functools.partial(F.huber_loss, delta=2.0), "ga.criterion(partial(F.huber_loss, delta=2.0))"),
        (functools.partial(F.huber_loss, 1, delta=2.0), "ga.criterion(partial(F.huber_loss, 1, delta=2.0))"),
    ],
    ids=["module", "function", "partial", "partial by position"],
)
def test_it_is_written_as_it_was_made(loss: Any, written: str) -> None:
    assert repr(criterion(loss)) == written


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy], ids=["CE", "function"])
def test_it_compiles_without_a_graph_break(loss: Any) -> None:
    made = criterion(loss)

    def total_and_weight(logits: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        micro = made(logits, labels)
        return micro.total, micro.weight

    compiled = torch.compile(total_and_weight, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(LOGITS, LABELS), total_and_weight(LOGITS, LABELS))
