"""The answer: exact or not, what keeps the two gradients apart, and what to type instead."""

from __future__ import annotations

from dataclasses import dataclass

from gradaccum.auditing import words
from gradaccum.auditing.verdicts import ParameterVerdict
from gradaccum.errors import InexactError

BATCH_NORM, LOSS_WEIGHT, COUPLED_LOSS, RANDOM = "batch-norm", "loss-weight", "coupled-loss", "random"
PRECISION, BUFFER, UNKNOWN = "precision", "buffer", "unknown"
KINDS = (BATCH_NORM, LOSS_WEIGHT, COUPLED_LOSS, RANDOM, PRECISION, BUFFER, UNKNOWN)


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
class Report:
    """Whether accumulation makes the whole batch's update; made by `audit`. ``print(report)`` is meant to be read.

    Attributes:
        exact: the gradient, and what forwards leave in the buffers, are the whole batch's up to rounding.
        relative_error: norm of the difference between the gradients over the norm of the whole batch's, in float64
            where that was possible.
        tolerance: what counts as rounding.
        culprits: what makes the difference, the worst first; empty if exact.
        parameters: a verdict for each parameter that is trained.
        samples: rows of the batch.
        micro_batch_sizes: how it was cut: ragged, since equal pieces hide what unequal ones show.
        equal_sizes_error: the relative error in micro-batches that are as equal as can be.
        dtype: what the comparison ran in.
        own_dtype: the model's own.
        own_error: in the model's own dtype, how far the accumulated gradient is off its exact value.
        own_whole_error: the same for the whole batch in one piece: what the dtype costs anyway.
        not_checked: what could not be looked at, and why.
        notes: what else there is to know.
    """

    exact: bool
    relative_error: float
    tolerance: float
    culprits: tuple[Culprit, ...]
    parameters: tuple[ParameterVerdict, ...]
    samples: int
    micro_batch_sizes: tuple[int, ...]
    equal_sizes_error: float
    dtype: str
    own_dtype: str
    own_error: float | None = None
    own_whole_error: float | None = None
    not_checked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def raise_if_inexact(self) -> None:
        """Nothing if the accumulated update is the whole batch's; for tests, and before a long run.

        Raises:
            InexactError: it is not; the message is the report.
        """
        if not self.exact:
            raise InexactError(str(self))

    def __str__(self) -> str:
        return words.text(self)
