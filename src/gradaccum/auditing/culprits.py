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
    """

    kind: str
    where: str
    what: str
    error: float
    remedy: str
    price: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One entry of the table; see `Culprit`."""

    kind: str
    what: str
    remedy: str
    price: str

    def found(self, error: float, where: str = "the loss", **values: str) -> Culprit:
        """Returns the culprit at a place, with the words in braces filled in."""
        what, remedy = self.what.format(**values), self.remedy.format(**values)
        return Culprit(kind=self.kind, where=where, what=what, error=error, remedy=remedy, price=self.price)


BATCH_NORM = Fault(
    kind="batch-norm",
    what="BatchNorm normalises each micro-batch with its own mean and variance, and its running statistics advance "
    "once for each.",
    remedy='ga.TrainStep(model, optimizer, loss_fn, batch_norm="exact"); when fine-tuning batch_norm="frozen"; in a '
    "new model nn.GroupNorm.",
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
    "returns the sums and batch_loss makes the loss of them. If it is a mean over a count of your own: "
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
    remedy="advance it once an update: module.eval() while the batch is accumulated, and one forward in training mode "
    "after the update; for running statistics track_running_stats=False.",
    price="one forward of a micro-batch, or nothing.",
)
PRECISION = Fault(
    kind="precision",
    what="Gradients are added up in {dtype}: rounding moves the sum by {accumulated}, where the whole batch in one "
    "piece is off by {whole}.",
    remedy="ga.TrainStep(model, optimizer, loss_fn, accumulate_dtype=torch.float32).",
    price="4 bytes for each parameter.",
)
UNEXPLAINED = Fault(
    kind="unknown",
    what="A difference is left that none of the checks explains: code around the model that looks at several samples, "
    "or state outside of it.",
    remedy="ga.TrainStep(model, optimizer, forward=forward, batch_loss=batch_loss) if it is the loss; otherwise do it "
    "to the whole batch before it is cut.",
    price=f"for two passes {_ONE_MORE_FORWARD}.",
)
