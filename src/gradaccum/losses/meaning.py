"""What was a plain mean taken over? Read off the autograd graph that made it.

A plain 0-d tensor is taken as a mean over samples. Where it was a mean over something else whose count is not
proportional to the samples (labels that are ignored, class weights, padded tokens) the sum over micro-batches would be
a mean of means. The last nodes of its graph tell: ``nll_loss`` keeps the sum of the weights it divided by,
``mse_loss`` and ``mean`` the tensor they averaged, a division its divisor. The counts that are found are compared with
the numbers of samples: the ratio must be the same for every micro-batch.

Not seen: means made inside of custom autograd functions or compiled losses. ``ga.criterion`` needs no guessing.
The attributes read here are those that PyTorch documents for graph inspection (``grad_fn._saved_*``, "Autograd
mechanics").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradaccum.errors import MeanError
from gradaccum.losses.normaliser import SINGLE

# Terms of a loss are few, and near its root; a walk that finds none must not cost a forward's time.
_MAX_DEPTH = 16
_MAX_NODES = 128
_MEAN = 1  # at::Reduction::Mean
_ROUNDING = 1e-5  # sums of fp32 class weights; a real mismatch is a whole sample's weight

Count = int | Tensor


@dataclass(frozen=True, slots=True)
class TakenOver:
    """One mean found in the graph of a loss."""

    count: Count  # what it was divided by: an int, or a 0-d tensor where it depends on the data
    what: str  # the same in words
    instead: str  # what to type instead of the plain mean
    may_be_constant: bool = False  # whether it may have nothing to do with samples: a penalty on the parameters, say


class SampleMeans:
    """Compares what plain means were taken over with the samples of their micro-batches, over one window.

    Every micro-batch of the first window is looked at; later only counts that depend on the data, and these only where
    they lie on the host: on a device each would be a wait. ``is_looking`` says whether `check` is still to be called.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[int, list[tuple[float, bool, TakenOver]]]]] = {}
        self._is_first_window = True
        self.is_looking = True

    def check_all(self, loss: Any, samples: int, weights: Mapping[str, Any]) -> None:
        """Checks every plain tensor of a loss, as the user returned it, but those that have a weight by name."""
        for name, plain in loss.items() if isinstance(loss, Mapping) else ((SINGLE, loss),):
            if isinstance(plain, Tensor) and name not in weights:
                self.check(name, plain, samples)

    def check(self, name: str, loss: Tensor, samples: int) -> None:
        """Checks one micro-batch's plain mean.

        Raises:
            MeanError: it was taken over something that is not proportional to the samples.
        """
        if samples == 0:
            return
        means = means_in(loss)
        if not self._is_first_window:
            means = [mean for mean in means if isinstance(mean.count, Tensor)]
            if any(mean.count.device.type != "cpu" for mean in means if isinstance(mean.count, Tensor)):
                return
        counts = [(float(mean.count), isinstance(mean.count, int), mean) for mean in means]
        seen = self._seen.setdefault(name, [])
        seen.append((samples, counts))
        if len(seen) > 1 and len(counts) == len(seen[0][1]):
            for i, (count, _, mean) in enumerate(counts):
                first = seen[0][1][i][0]
                if not _is_proportional(first, seen[0][0], count, samples, mean=mean):
                    raise MeanError(_message(name, mean, [(c[i][0], n) for n, c in seen if len(c) > i]))

    def window_closed(self) -> None:
        """Forgets the window's counts, and decides whether later windows are looked at."""
        if any(len(seen) > 1 for seen in self._seen.values()):
            self._is_first_window = False
            self.is_looking = any(
                not is_shape for seen in self._seen.values() for _, counts in seen for _, is_shape, _ in counts
            )
        self._seen.clear()

    def window_discarded(self) -> None:
        """Forgets what has been seen of the open window."""
        self._seen.clear()


def means_in(loss: Tensor) -> list[TakenOver]:
    """The means near the root of the loss's graph, in the order of the graph; empty where none is recognised."""
    return _means_below(loss.grad_fn, _MAX_DEPTH, [_MAX_NODES])


def _means_below(node: Any, depth: int, nodes_left: list[int]) -> list[TakenOver]:
    if node is None or depth == 0 or nodes_left[0] == 0:
        return []
    nodes_left[0] -= 1
    name = node.name()
    if _TRANSPARENT.fullmatch(name) or _averages_terms(node):
        below = [mean for parent, _ in node.next_functions for mean in _means_below(parent, depth - 1, nodes_left)]
        if below:  # what they are divided by on their way is a factor, not what they are means over
            return below
    reader = _READERS.get(name)
    if reader is None:
        return []
    try:
        mean = reader(node)
    except (RuntimeError, AttributeError):  # freed, modified in place, or kept by another name
        return []
    return [] if mean is None else [mean]


def _averages_terms(node: Any) -> bool:
    """Whether a mean is that of a few scalars: ``torch.stack([first, second]).mean()``."""
    parent = node.next_functions[0][0] if node.name() == "MeanBackward0" else None
    return parent is not None and parent.name() == "StackBackward0"


def _is_proportional(first: float, first_samples: int, count: float, samples: int, *, mean: TakenOver) -> bool:
    if abs(count * first_samples - first * samples) <= _ROUNDING * abs(first * samples):
        return True
    # The same count for other numbers of samples is a term that has nothing to do with samples, such as a penalty on
    # the parameters, and exact as it is: unless a fixed batch size was divided by.
    return mean.may_be_constant and count == first and count not in (samples, first_samples)


def _message(name: str, mean: TakenOver, seen: list[tuple[float, int]]) -> str:
    counts = ", ".join(f"{count:g}" for count, _ in seen)
    samples = ", ".join(str(n) for _, n in seen)
    total_count, total_samples = sum(count for count, _ in seen), sum(n for _, n in seen)
    taken = [(n / total_samples) / (count / total_count) for count, n in seen if count]
    factor = max((max(share, 1 / share) for share in taken), default=float("inf"))
    term = f"The term {name!r}" if name else "The loss"
    return (
        f"{term} is a plain tensor and so is taken as a mean over samples, but it was averaged over {mean.what}: "
        f"{counts} in micro-batches of {samples} samples. Weighted by samples, one of them would count {factor:.3g} "
        f"times what it should in the gradient. Return the loss with what it was averaged over: {mean.instead}."
    )


def _nll(node: Any) -> TakenOver | None:
    if node._saved_reduction != _MEAN:
        return None
    weighted = node._saved_weight is not None
    return TakenOver(
        node._saved_total_weight,
        "the sum of class weights" if weighted else "targets that are not ignored",
        "criterion = ga.criterion(nn.CrossEntropyLoss(...)) and criterion(output, target)",
    )


def _elements(saved: str, module: str) -> Callable[[Any], TakenOver | None]:
    def read(node: Any) -> TakenOver | None:
        if getattr(node, "_saved_reduction", _MEAN) != _MEAN:
            return None
        instead = f"criterion = ga.criterion(nn.{module}()) and criterion(output, target)"
        return TakenOver(getattr(node, saved).numel(), "elements", instead, may_be_constant=True)

    return read


def _mean(node: Any) -> TakenOver | None:
    sizes = node._saved_self_sym_sizes if node.name() == "MeanBackward1" else None
    if sizes is not None and len(node._saved_dim or sizes) != len(sizes):
        return None  # a mean over some of the dimensions
    count = int(node._saved_self_sym_numel) if sizes is None else math.prod(int(size) for size in sizes)
    instead = "ga.Loss.sum(losses.sum(), over=losses.numel())"
    return TakenOver(count, "elements", instead, may_be_constant=True)


def _quotient(node: Any) -> TakenOver | None:
    """A sum divided by a count: ``(losses * mask).sum() / mask.sum()``."""
    divisor = node._saved_other
    if divisor.dim() != 0 or divisor.requires_grad:
        return None
    instead = "ga.Loss.sum(losses.sum(), over=count)"
    return TakenOver(divisor.detach(), "what it was divided by", instead, may_be_constant=True)


_READERS: dict[str, Callable[[Any], TakenOver | None]] = {
    "NllLossBackward0": _nll,
    "NllLoss2DBackward0": _nll,
    "MseLossBackward0": _elements("_saved_self", "MSELoss"),
    "SmoothL1LossBackward0": _elements("_saved_self", "SmoothL1Loss"),
    "HuberLossBackward0": _elements("_saved_self", "HuberLoss"),
    "BinaryCrossEntropyBackward0": _elements("_saved_self", "BCELoss"),
    "BinaryCrossEntropyWithLogitsBackward0": _elements("_saved_self", "BCEWithLogitsLoss"),
    "SoftMarginLossBackward0": _elements("_saved_self", "SoftMarginLoss"),
    "MeanBackward0": _mean,
    "MeanBackward1": _mean,
    "DivBackward0": _quotient,
}

# What a mean may still pass through on its way to the loss: sums of terms, factors, casts.
_TRANSPARENT = re.compile(
    r"(Add|Alias|Clone|Div|Mul|Neg|Rsub|Select|Squeeze|Stack|Sub|Sum|ToCopy|View)Backward0|(Div|Mul|Rsub)Backward1"
)
