"""What a plain loss was a mean over, for loops that are not the library's."""

from __future__ import annotations

from torch import Tensor

from gradaccum.errors import LossError
from gradaccum.losses.counted_terms import ROUNDING
from gradaccum.losses.graph_means import terms_of
from gradaccum.losses.loss import Loss
from gradaccum.losses.meaning import means_in
from gradaccum.losses.normaliser import host_number
from gradaccum.losses.wrong_means import name_of


def weight_of(loss: Tensor) -> Loss:
    """What a plain loss was a mean over, read off its graph, as a `Loss` of the same value.

    The count is that of elements, of labels that are not ignored, or the sum of class weights: whatever the mean was
    divided by. Factors (``0.5 * loss``) stay factors.

    Args:
        loss: 0-d tensor with a graph.

    Returns:
        ``ga.Loss.mean(loss, over=count)``; the count is on the loss's device where it depends on the data.

    Raises:
        LossError: the loss is a sum, was made by something whose inside has no graph (compiled, a custom autograd
            function), or is a sum of means over different things.

    Example:
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> ga.weight_of(F.cross_entropy(logits, torch.tensor([0, 2, -100, 1]))).weight
        tensor(3.)
    """
    if not isinstance(loss, Tensor) or loss.dim() or loss.grad_fn is None:
        shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(
            f"ga.weight_of needs a 0-d tensor with a graph, and got one {shown} that has none to be read. Its share of "
            "the gradient would be a guess. Pass the loss itself, before .item() and .detach()."
        )
    terms = [term for term in terms_of(loss) if term.kind != "penalty"]
    means = means_in(loss)
    if any(term.kind == "sum" for term in terms) and len(means) < len(terms):
        raise LossError(
            "ga.weight_of was given a sum, which was divided by nothing, so that it has no weight. As a mean each "
            "micro-batch's gradient would be too small by the number of them. Say what it is: ga.Loss.sum(loss), or "
            "ga.Loss.sum(loss, over=n) for a sum that is to be divided by n."
        )
    # A sum of products beside another term: what multiplies may be of the whole micro-batch (experts' balance).
    may_couple = len(terms) > 1 and any(term.kind == "sum" and not term.is_sure for term in terms)
    if not means or len(means) < len(terms) or may_couple:
        nodes = ", ".join(dict.fromkeys(name_of(term) for term in terms if term.kind != "mean"))
        raise LossError(
            f"What this mean is over cannot be seen: its graph ends in {nodes}, which does not say what it divided by. "
            "Its share of the gradient would be a guess. Say it: ga.Loss.mean(loss, over=n)."
        )
    counts = [host_number(mean.count) for mean in means]
    first = counts[0]
    if any(bool(abs(count - first) > ROUNDING * abs(first)) for count in counts[1:]):
        shown = " and ".join(f"{float(count):g} ({mean.what})" for count, mean in zip(counts, means, strict=True))
        raise LossError(
            f"The loss is a sum of means over different things, {shown}, so that it has no single weight: weighed by "
            'one of them the others would be wrong. Return them by name, {"first": ..., "second": ...}, and pass '
            "weights=, which counts both."
        )
    return Loss.mean(loss, over=means[0].count)
