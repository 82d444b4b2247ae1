"""The cases of the loss tests: every loss of torch with every option that could change what its mean is taken over.

At the end, how micro-batches of a case are cut and added up.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.losses.criterion import criterion
from gradaccum.losses.torch_losses import HAS_LINEAR_CROSS_ENTROPY

ROWS = 13
CLASSES = 5
DOUBLE = torch.float64
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 3.0, 0.1], dtype=DOUBLE)
ROW_WEIGHTS = torch.tensor([0.2, 1.0, 5.0], dtype=DOUBLE)

Inputs = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss of torch: as a class, as a function, and what both are called with."""

    module: Callable[[], nn.Module]
    function: Callable[..., Tensor] | None = None
    inputs: Callable[[int], Inputs]
    rows_at: tuple[int, ...] = (0, 0, 0, 0)
    depends_on_data: bool = False  # the weight is a tensor
    reads_data: bool = False  # torch itself looks at values, so that shapes alone are not enough


def output(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).requires_grad_()


def positive(*shape: int) -> Tensor:
    return (torch.rand(shape, dtype=DOUBLE) + 0.5).requires_grad_()


def share(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=DOUBLE) * 0.9 + 0.05


def learned_share(*shape: int) -> Tensor:
    return share(*shape).requires_grad_()


def log_shares(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).log_softmax(1).requires_grad_()


def sign(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).to(DOUBLE) * 2 - 1


def labels(*shape: int, ignored: int = -100) -> Tensor:
    return torch.randint(0, CLASSES, shape).masked_fill(torch.rand(shape) < 0.3, ignored)


def classified(*sizes: int, ignored: int = -100) -> Callable[[int], Inputs]:
    return lambda rows: (output(rows, CLASSES, *sizes), labels(rows, *sizes, ignored=ignored))


def soft(*sizes: int) -> Callable[[int], Inputs]:
    return lambda rows: (output(rows, CLASSES, *sizes), share(rows, CLASSES, *sizes))


def pair(target: Callable[..., Tensor], *, inputs: Callable[..., Tensor] = output) -> Callable[[int], Inputs]:
    return lambda rows: (inputs(rows, 3), target(rows, 3))


def three(last: Callable[..., Tensor] = output, *sizes: int) -> Callable[[int], Inputs]:
    return lambda rows: (output(rows, *sizes), output(rows, *sizes), last(rows))


def of_classes(module: Any, function: Any, inputs: Callable[[int], Inputs], **options: Any) -> Case:
    return replace(simple(module, function, inputs, **options), depends_on_data=not inputs(1)[1].is_floating_point())


cross_entropy = functools.partial(of_classes, nn.CrossEntropyLoss, F.cross_entropy)


def linear_cross_entropy(inputs: Callable[[int], Inputs], **options: Any) -> Case:
    return Case(
        module=lambda: nn.LinearCrossEntropyLoss(6, CLASSES, bias=True, dtype=DOUBLE, **options),
        inputs=inputs,
        depends_on_data=not inputs(1)[1].is_floating_point(),
        reads_data=options.get("options") is not None,
    )


def simple(
    module: Callable[..., nn.Module], function: Callable[..., Tensor], inputs: Callable[[int], Inputs], **options: Any
) -> Case:
    return Case(module=lambda: module(**options), function=functools.partial(function, **options), inputs=inputs)


kl_div = functools.partial(simple, nn.KLDivLoss, F.kl_div)
poisson = functools.partial(simple, nn.PoissonNLLLoss, F.poisson_nll_loss)
with_logits = functools.partial(simple, nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, pair(share))


def sequences(rows: int) -> Inputs:
    """Targets of 0 to 4 labels, and inputs of which some are too short for them."""
    lengths = torch.randint(0, 5, (rows,))
    return output(9, rows, CLASSES), torch.randint(1, CLASSES, (rows, 4)), torch.randint(3, 10, (rows,)), lengths


def gaussian(inputs: Callable[[int], Inputs], **options: Any) -> Case:
    return replace(simple(nn.GaussianNLLLoss, F.gaussian_nll_loss, inputs, **options), reads_data=True)


def ctc(inputs: Callable[[int], Inputs], **options: Any) -> Case:
    case = simple(nn.CTCLoss, F.ctc_loss, inputs, zero_infinity=True, **options)
    return replace(case, rows_at=(1, 0, 0, 0), reads_data=True)


def hidden(*sizes: int) -> Callable[[int], Inputs]:
    return lambda rows: (output(rows, 6), labels(rows, *sizes))


def one_label(rows: int) -> Inputs:
    return output(rows, CLASSES), torch.randint(0, CLASSES, (rows,))


three_rows = three(lambda rows: output(rows, 3), 3)

CASES = {
    "L1": simple(nn.L1Loss, F.l1_loss, pair(output)),
    "MSE": simple(nn.MSELoss, F.mse_loss, pair(output)),
    "SmoothL1": simple(nn.SmoothL1Loss, F.smooth_l1_loss, pair(output), beta=0.3),
    "SmoothL1 of L1": simple(nn.SmoothL1Loss, F.smooth_l1_loss, pair(output), beta=0.0),
    "Huber": simple(nn.HuberLoss, F.huber_loss, pair(output), delta=0.7),
    "PoissonNLL": poisson(pair(positive), full=True),
    "PoissonNLL no log": poisson(pair(positive, inputs=positive), log_input=False, eps=1e-3),
    "PoissonNLL broadcast": poisson(lambda rows: (output(rows, 1), positive(rows, 3))),
    "GaussianNLL": gaussian(three(lambda rows: positive(rows, 3), 3), full=True),
    "GaussianNLL one variance": gaussian(three(positive, 3)),
    "BCE": simple(nn.BCELoss, F.binary_cross_entropy, pair(share, inputs=learned_share)),
    "BCE weight": simple(nn.BCELoss, F.binary_cross_entropy, pair(share, inputs=learned_share), weight=ROW_WEIGHTS),
    "BCEWithLogits": with_logits(),
    "BCEWithLogits weights": with_logits(weight=ROW_WEIGHTS, pos_weight=ROW_WEIGHTS.flip(0)),
    "KLDiv": kl_div(pair(share, inputs=log_shares)),
    "KLDiv batchmean": kl_div(pair(share, inputs=log_shares), reduction="batchmean"),
    "KLDiv log": kl_div(pair(log_shares, inputs=log_shares), log_target=True),
    "KLDiv batchmean log": kl_div(pair(log_shares, inputs=log_shares), log_target=True, reduction="batchmean"),
    "HingeEmbedding": simple(nn.HingeEmbeddingLoss, F.hinge_embedding_loss, pair(sign), margin=0.8),
    "MarginRanking": simple(nn.MarginRankingLoss, F.margin_ranking_loss, three(sign), margin=0.3),
    "CosineEmbedding": simple(nn.CosineEmbeddingLoss, F.cosine_embedding_loss, three(sign, 3), margin=0.1),
    "SoftMargin": simple(nn.SoftMarginLoss, F.soft_margin_loss, pair(sign)),
    "MultiMargin": simple(nn.MultiMarginLoss, F.multi_margin_loss, one_label, p=2, margin=0.9, weight=CLASS_WEIGHTS),
    "MultiLabelMargin": simple(
        nn.MultiLabelMarginLoss,
        F.multilabel_margin_loss,
        lambda rows: (output(rows, CLASSES), torch.randint(-1, CLASSES, (rows, CLASSES))),
    ),
    "MultiLabelSoftMargin": simple(
        nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, pair(share), weight=ROW_WEIGHTS
    ),
    "TripletMargin": simple(
        nn.TripletMarginLoss, F.triplet_margin_loss, three_rows, margin=0.5, p=3.0, eps=1e-3, swap=True
    ),
    "TripletMarginWithDistance": simple(
        nn.TripletMarginWithDistanceLoss,
        F.triplet_margin_with_distance_loss,
        three_rows,
        distance_function=lambda a, b: (a - b).abs().sum(-1),
        margin=0.5,
        swap=True,
    ),
    "CTC": ctc(sequences),
    "CTC blank": ctc(lambda rows: (lambda x, t, m, n: (x, t - 1, m, n))(*sequences(rows)), blank=CLASSES - 1),
    "AdaptiveLogSoftmaxWithLoss": Case(
        module=lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [4, 10], div_value=2.0, dtype=DOUBLE),
        inputs=lambda rows: (output(rows, 8), torch.randint(0, 20, (rows,))),
        reads_data=True,
    ),
    "NLL": of_classes(nn.NLLLoss, F.nll_loss, classified(ignored=2), weight=CLASS_WEIGHTS, ignore_index=2),
    "NLL 2d": of_classes(nn.NLLLoss, F.nll_loss, classified(3, 2)),
    "CrossEntropy": cross_entropy(classified()),
    "CrossEntropy ignored class": cross_entropy(classified(ignored=1), ignore_index=1),
    "CrossEntropy weight": cross_entropy(classified(), weight=CLASS_WEIGHTS),
    "CrossEntropy smooth": cross_entropy(classified(), label_smoothing=0.2),
    "CrossEntropy weight smooth 1d": cross_entropy(classified(4), weight=CLASS_WEIGHTS, label_smoothing=0.2),
    "CrossEntropy weight 3d": cross_entropy(classified(2, 3, 2), weight=CLASS_WEIGHTS),
    "CrossEntropy soft": cross_entropy(soft()),
    "CrossEntropy soft weight smooth 2d": cross_entropy(soft(3, 2), weight=CLASS_WEIGHTS, label_smoothing=0.2),
}
if HAS_LINEAR_CROSS_ENTROPY:
    CASES |= {
        "LinearCrossEntropy": linear_cross_entropy(hidden(), weight=CLASS_WEIGHTS),
        "LinearCrossEntropy 1d": linear_cross_entropy(hidden(2), out_features=(2,), label_smoothing=0.1),
        "LinearCrossEntropy soft": linear_cross_entropy(lambda rows: (output(rows, 6), share(rows, CLASSES))),
        "LinearCrossEntropy chunks": linear_cross_entropy(
            hidden(), weight=CLASS_WEIGHTS, options=nn.LinearCrossEntropyOptions(batch_chunk_size=3)
        ),
    }


def forms(case: Case) -> dict[str, Callable[..., Any]]:
    """The same loss as a module, as a partial, and as a function with its options passed at the call."""
    made: dict[str, Callable[..., Any]] = {"class": criterion(case.module())}
    if case.function is not None:
        made["partial"] = criterion(case.function)
    if isinstance(case.function, functools.partial):
        made["function"] = functools.partial(criterion(case.function.func), **case.function.keywords)
    return made


def gradient(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def cut(inputs: Inputs, sizes: tuple[int, ...], rows_at: tuple[int, ...]) -> list[Inputs]:
    return list(zip(*(x.split(sizes, dim=dim) for x, dim in zip(inputs, rows_at, strict=False)), strict=True))


def accumulated(loss: Any, parts: list[Inputs], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """( sum_b total_b ) / ( sum_b w_b ), and its gradient from one backward for each micro-batch."""
    total, weight = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for part in parts:
        micro = loss(*part)
        total, weight = total + micro.total.detach(), weight + micro.weight
        gradients = [g + d for g, d in zip(gradients, gradient(micro.total, leaves), strict=True)]
    return total / weight, [g / weight for g in gradients]
