"""What to type instead, and what it costs. The library's own options are named as they are typed."""

from __future__ import annotations

from collections.abc import Sequence

from gradaccum.auditing.loss_weights import A_SUM, COUPLED, LossFinding
from gradaccum.auditing.report import (
    BATCH_NORM,
    BUFFER,
    COUPLED_LOSS,
    LOSS_WEIGHT,
    PRECISION,
    RANDOM,
    UNKNOWN,
    Culprit,
)

_FREE = "nothing."


def batch_norm(where: str, error: float) -> Culprit:
    """A BatchNorm layer in training mode."""
    return Culprit(
        kind=BATCH_NORM,
        where=where,
        what="BatchNorm normalises each micro-batch with its own mean and variance, and its running statistics "
        "advance once for each.",
        error=error,
        remedy='ga.TrainStep(model, optimizer, loss_fn, batch_norm="exact"); when fine-tuning batch_norm="frozen"; '
        "in a new model nn.GroupNorm.",
        price='"exact" keeps the whole batch\'s activations, on the host or computed again (one more forward); '
        '"frozen" and GroupNorm cost nothing.',
    )


def layer(where: str, class_name: str, error: float) -> Culprit:
    """Any other layer that couples samples."""
    return Culprit(
        kind=UNKNOWN,
        where=where,
        what=f"{class_name} couples samples: replacing some of them changes what it gives for the others, so each "
        "micro-batch is another network.",
        error=error,
        remedy="ga.TrainStep(model, optimizer, loss_fn, lockstep=True), and in the layer x = ga.gather(x) where it "
        "looks at other samples.",
        price="the whole batch's activations, on the host or computed again (one more forward).",
    )


def loss(finding: LossFinding, error: float) -> Culprit:
    """A loss whose micro-batches do not count what the library takes them to count, or that couples samples."""
    if finding.kind == COUPLED:
        return _coupled_loss(finding, error)
    is_a = "" if finding.over == A_SUM else "a mean over "
    return Culprit(
        kind=LOSS_WEIGHT,
        where="the loss",
        what=f"The loss is {is_a}{finding.over}, and is taken as {finding.taken}: each micro-batch gets another share "
        "of the gradient than it has in the whole batch.",
        error=error,
        remedy=finding.instead or "return ga.Loss.mean(value, over=n) with the n that the mean was taken over.",
        price=_FREE,
    )


def _coupled_loss(finding: LossFinding, error: float) -> Culprit:
    if finding.shares is not None:
        return Culprit(
            kind=COUPLED_LOSS,
            where="the loss",
            what="The loss is a function of sums over the batch (a root or a ratio of them, say): each micro-batch's "
            "gradient has the right direction, but its share depends on all the others.",
            error=error,
            remedy='ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss, combine="sum"), where '
            "forward returns the sums and batch_loss makes the loss of them. If it is a mean over a count of your "
            "own: ga.Loss.sum(losses.sum(), over=count).",
            price="one more forward of what does not fit in memory at once.",
        )
    return Culprit(
        kind=COUPLED_LOSS,
        where="the loss",
        what="The loss compares samples with each other: no weights of the micro-batches' gradients give the whole "
        f"batch's ({100 * finding.residual:.2g}% of it cannot be explained by any).",
        error=error,
        remedy="ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss), where forward returns the "
        "outputs and batch_loss sees those of the whole batch.",
        price="one more forward of what does not fit in memory at once, and all outputs in memory.",
    )


def random(where: str, once: Sequence[str], unmatched: Sequence[str], error: float) -> Culprit:
    """Something drawn once for each forward, or drawn in a way that could not be replayed."""
    seen = ""
    if once:
        seen = f"Drawn once for each forward, so anew for each micro-batch: {' and '.join(once)}."
    if unmatched:
        seen += f" Not replayed, since its samples could not be told from its shape: {' and '.join(unmatched)}."
    return Culprit(
        kind=RANDOM,
        where=where,
        what=seen.strip(),
        error=error,
        remedy="draw it for each sample, torch.rand(len(x), device=x.device), or once before the batch is cut, as a "
        "column of the batch.",
        price=_FREE,
    )


def buffer(where: str, buffers: str, error: float, *, moves_gradient: bool) -> Culprit:
    """State that advances with every forward."""
    effect = (
        "so later micro-batches run through another network than the first."
        if moves_gradient
        else "so it ends elsewhere; the gradient is not affected."
    )
    return Culprit(
        kind=BUFFER,
        where=where,
        what=f"{buffers} advances with every micro-batch instead of once an update, {effect}",
        error=error,
        remedy="advance it once an update: module.eval() while the batch is accumulated, and one forward in training "
        "mode after the update; for running statistics track_running_stats=False.",
        price="one forward of a micro-batch, or nothing.",
    )


def precision(dtype: str, accumulated: float, whole: float) -> Culprit:
    """Gradients that are added up in sixteen bits."""
    return Culprit(
        kind=PRECISION,
        where="the gradients",
        what=f"Gradients are added up in {dtype}: rounding moves the sum by {100 * accumulated:.2g}%, where the whole "
        f"batch in one piece is off by {100 * whole:.2g}%.",
        error=accumulated,
        remedy="ga.TrainStep(model, optimizer, loss_fn, accumulate_dtype=torch.float32).",
        price="4 bytes for each parameter.",
    )


def unexplained(error: float) -> Culprit:
    """What is left when all that was found is taken out."""
    return Culprit(
        kind=UNKNOWN,
        where="the loss",
        what="A difference is left that none of the checks explains: code around the model that looks at several "
        "samples, or state outside of it.",
        error=error,
        remedy="ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss) if it is the loss; otherwise do "
        "it to the whole batch before it is cut.",
        price="for two passes one more forward of what does not fit in memory at once.",
    )
