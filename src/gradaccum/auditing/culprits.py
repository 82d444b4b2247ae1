"""The kinds of culprits: what each does to the gradient, what to type instead, and what that costs.

A table, one entry a kind; the library's own options are named as they are typed. Words in braces are filled in where a
culprit is found.
"""

from __future__ import annotations

from dataclasses import dataclass

_FREE = "nothing."
_ONE_MORE_FORWARD = "one more forward of what does not fit in memory at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """One thing that makes accumulation differ from the whole batch.

    Attributes:
        kind: "batch-norm", "loss-weight", "coupled-loss", "random", "precision", "buffer" or "unknown".
        where: the qualified name of the module, or "the loss".
        what: what was seen, in a sentence.
        error: how far it alone moves the gradient, relative to the whole batch's, with all other culprits taken out;
            for "buffer" without an effect on the gradient, how far the buffer is off.
        remedy: what to type instead.
        price: what that costs.
        tried: what came of it when the remedy was run on this batch, or why it could not be.
    """

    kind: str
    where: str
    what: str
    error: float
    remedy: str
    price: str
    tried: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One entry of the table; see `Culprit`."""

    kind: str
    what: str
    remedy: str
    price: str

    def found(self, error: float, where: str = "the loss", *, tried: str = "", **values: str) -> Culprit:
        """Returns the culprit at a place, with the words in braces filled in."""
        what, remedy = self.what.format(**values), self.remedy.format(**values)
        return Culprit(
            kind=self.kind, where=where, what=what, error=error, remedy=remedy, price=self.price, tried=tried
        )


BATCH_NORM = Fault(
    kind="batch-norm",
    what="BatchNorm normalises each micro-batch with its own mean and variance, and its running statistics advance "
    "once for each.",
    remedy="{options}in a new model nn.GroupNorm.",
    price='"exact" keeps the whole batch\'s activations, on the host or computed again (one more forward); "frozen" '
    "and GroupNorm cost nothing.",
)
COUPLING_LAYER = Fault(
    kind="unknown",
    what="{layer} couples samples: replacing some of them changes what it gives for the others, so each micro-batch is "
    "another network.",
    remedy="ga.TrainStep(model, optimizer, loss_fn, lockstep=True), and in the layer x = ga.gather(x) where it looks "
    "at other samples.",
    price="the whole batch's activations, on the host or computed again (one more forward).",
)
WRONG_AXIS = Fault(
    kind="unknown",
    what="{layer} takes dimension 0 for time, and samples are cut along it: each sample sees those before it.",
    remedy="{layer}(..., batch_first=True) with data [samples, time, ...]; if the data are [time, samples, ...], "
    "transpose them before the batch is cut.",
    price=_FREE,
)
SET_UP_BY_DATA = Fault(
    kind="buffer",
    what="{tensors} of {layer} are written by the forward from the samples that it sees: by the first micro-batch, "
    "where it should be the whole batch.",
    remedy="run one forward, with torch.no_grad(): model(x), before training.",
    price="one forward.",
)
WRONG_SHARES = Fault(
    kind="loss-weight",
    what="The loss is {over}, and is taken as {taken}: each micro-batch gets another share of the gradient than it has "
    "in the whole batch.",
    remedy="{instead}",
    price=_FREE,
)
LOSS_OF_SUMS = Fault(
    kind="coupled-loss",
    what="The loss is a function of sums over the batch (a root or a ratio of them, say): each micro-batch's gradient "
    "has the right direction, but its share depends on all the others.",
    remedy='ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss, combine="sum"), where forward '
    "returns the sums and batch_loss makes the loss of them. If it is a mean over a count of your own (not tried): "
    "ga.Loss.sum(losses.sum(), over=count).",
    price=f"{_ONE_MORE_FORWARD}.",
)
LOSS_OF_PAIRS = Fault(
    kind="coupled-loss",
    what="The loss compares samples with each other: no weights of the micro-batches' gradients give the whole batch's "
    "({unexplained} of it cannot be explained by any).",
    remedy="ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss), where forward returns the outputs "
    "and batch_loss sees those of the whole batch.",
    price=f"{_ONE_MORE_FORWARD}, and all outputs in memory.",
)
RANDOM = Fault(
    kind="random",
    what="{draws}",
    remedy="draw it for each sample, torch.rand(len(x), device=x.device), or once before the batch is cut, as a column "
    "of the batch.",
    price=_FREE,
)
BUFFER = Fault(
    kind="buffer",
    what="{buffers} advances with every micro-batch instead of once an update, {effect}",
    remedy="{remedy}",
    price="one forward of a micro-batch, or nothing.",
)
ADVANCE_IN_EVAL = (
    "advance it once an update: module.eval() while the batch is accumulated, and one forward in training mode after "
    "the update; for running statistics track_running_stats=False."
)
ADVANCE_BY_HAND = (
    "advance it once an update: take what writes it out of forward, and call it after train_step(batch). It is written "
    "in eval mode too, so module.eval() does not help."
)
PRECISION = Fault(
    kind="precision",
    what="Gradients are added up in {dtype}: rounding moves the sum by {accumulated}, where the whole batch in one "
    "piece is off by {whole}.",
    remedy="ga.TrainStep(model, optimizer, loss_fn, accumulate_dtype=torch.float32).",
    price="4 bytes for each parameter.",
)
PRECISION_OF_CODE = Fault(
    kind="precision",
    what="In {dtype} the accumulated gradient is off by {accumulated}, where the whole batch in one piece is off by "
    "{whole}; in float64 it is right.",
    remedy="a larger micro_batch_size, or code of yours that computes in float32 what is small.",
    price="memory.",
)
INJECTED = Fault(
    kind="unknown",
    what="The backward is not linear in the loss: twice the loss does not make twice the gradient here. Something in "
    "it adds or changes gradients by itself (an autograd.Function that injects an auxiliary loss, a hook that clamps), "
    "once for each micro-batch and whatever its share of the batch is.",
    remedy='return the auxiliary loss with the other: return {{"loss": loss, "aux": ga.Loss.mean(aux, over=n)}}. '
    "Clipping belongs after the last micro-batch: clip_norm=.",
    price=_FREE,
)
UNEXPLAINED = Fault(
    kind="unknown",
    what="A difference is left that none of the checks explains: code around the model that looks at several samples, "
    "or state outside of it.",
    remedy="{remedy}do it to the whole batch before it is cut.",
    price=f"for two passes {_ONE_MORE_FORWARD}.",
)
IF_IT_IS_THE_LOSS = (
    "ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss) if it is the loss; otherwise "
)
