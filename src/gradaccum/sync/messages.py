"""The messages between processes: what each of them says, and how it travels as 64-bit integers.

A message begins with a header of the same length whatever it is about, so a process that is somewhere else than the
others, or has failed, says so to all of them in one exchange, and each of them can read it. The header says how it
went on the sender, who it is, what the message is for, of which update and pass and of which models. The rest is used
only if all headers agree (`check_fit`). Objects and tensors have no header, so they are exchanged only right after
messages that agreed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from gradaccum.errors import RankError

PREFIX = 48
"""Integers of a message that are exchanged first: the header, and all of what follows for up to 250 parameters."""


class Outcome(IntEnum):
    """How it went on one process; of several processes the largest counts."""

    FINE = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


class Kind(IntEnum):
    """What a message is for: where its sender is in an update, or beside it."""

    FAILURE = 0
    MEETING = 1
    OPENING_A_WINDOW = 2
    RUNNING_A_MICRO_BATCH = 3
    EXCHANGING_OUTPUTS = 4
    LOOKING_FOR_A_SIZE = 5
    CLOSING_A_WINDOW = 6
    STEPPED = 7
    SAVING = 8
    LOADING = 9
    LOOKING_AT_A_FEW_ROWS = 10


class Caller(IntEnum):
    """Who sends it: what the user has called."""

    ACCUMULATOR = 0
    TRAIN_STEP = 1
    BACKWARD = 2
    CHECKPOINT = 3


_DOES = {
    Kind.FAILURE: "failed before",
    Kind.MEETING: "begins with",
    Kind.OPENING_A_WINDOW: "opens the window of",
    Kind.RUNNING_A_MICRO_BATCH: "runs a micro-batch of",
    Kind.EXCHANGING_OUTPUTS: "exchanges outputs or statistics in",
    Kind.LOOKING_FOR_A_SIZE: "looks for a micro-batch size in",
    Kind.CLOSING_A_WINDOW: "closes the window of",
    Kind.STEPPED: "has stepped its optimizer in",
    Kind.LOOKING_AT_A_FEW_ROWS: "looks at a few rows before",
}
_OF = {
    Caller.ACCUMULATOR: "an Accumulator",
    Caller.TRAIN_STEP: "a TrainStep",
    Caller.BACKWARD: "train_step.backward",
    Caller.CHECKPOINT: "a Checkpoint",
}


class TermKind(IntEnum):
    """What a process has of a term of the loss: nothing; a weight on the host or device; a sum that is not divided."""

    ABSENT = 0
    ON_HOST = 1
    ON_DEVICE = 2
    PLAIN_SUM = 3


class TermShare(NamedTuple):
    """One process's part of a term. What lies on a device is 0 here, and added up there."""

    kind: TermKind = TermKind.ABSENT
    weight: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """What one process says to all others, fields in the order in which they travel; the header ends with the model."""

    outcome: Outcome
    kind: Kind
    update: int  # its index, from 1
    model: int  # checksum of the parameters' names, shapes and dtypes; 0 where it has not been compared
    caller: Caller = Caller.ACCUMULATOR
    sender: int = 0  # its rank among all processes, not only those that train together
    passes: int = 0  # passes over a loader that it has begun
    micro_batches: int = 0  # of the sender in this window
    samples: int = 0  # their rows; or another number, where the message is for comparing that
    largest: int = 0  # rows of the largest micro-batch
    is_done: bool = False  # the sender has nothing more to add but the micro-batch that it is about to run, if any
    has_new_terms: bool = False  # its loss has terms for which messages have no place yet
    has_unknown_sizes: bool = False  # rows of some micro-batch could not be counted
    wants_to_stop: bool = False  # it has been told to save and to leave
    terms: Sequence[TermShare] = ()  # in the order on which the processes have agreed
    uses: Sequence[int] = ()  # of each parameter, see `flat.Use`

    def to_numbers(self, *, num_terms: int, num_uses: int) -> list[int]:
        """The message as integers, as many as every process sends with these numbers of terms and parameters."""
        terms = [*self.terms, *[TermShare()] * (num_terms - len(self.terms))]
        packed = _layout(num_terms, num_uses).pack(
            *(self.outcome, self.kind, self.update, self.model, self.caller, self.sender, self.passes),
            *(self.micro_batches, self.samples, self.largest),
            *(self.is_done, self.has_new_terms, self.has_unknown_sizes, self.wants_to_stop),
            *(number for term in terms for number in term),
            *self.uses,
            *[0] * (num_uses - len(self.uses)),
        )
        numbers = struct.unpack(f"<{len(packed) // 8}q", packed)
        return [*numbers, *[0] * (PREFIX - len(numbers))]

    @staticmethod
    def from_numbers(numbers: Sequence[int], *, num_terms: int, num_uses: int) -> Message:
        """The message from what `to_numbers` made of it."""
        layout = _layout(num_terms, num_uses)
        packed = struct.pack(f"<{len(numbers)}q", *numbers)[: layout.size]
        outcome, kind, update, model, caller, *others = layout.unpack(packed)
        counts, rest = others[:_NUM_COUNTS], others[_NUM_COUNTS:]
        terms = [TermShare(TermKind(rest[i]), *rest[i + 1 : i + 3]) for i in range(0, 3 * num_terms, 3)]
        return Message(
            *(Outcome(outcome), Kind(kind), update, model, Caller(caller)),
            *counts,
            terms=terms,
            uses=rest[3 * num_terms :],
        )

    @property
    def place(self) -> str:
        """The header in words, for errors: what its sender does."""
        if self.kind == Kind.SAVING:
            return f"saves a checkpoint (at update {self.update})"
        if self.kind == Kind.LOADING:
            return "loads a checkpoint"
        of_pass = f", in pass {self.passes} over its loader," if self.passes else ""
        model = f" (model {self.model:08x})" if self.model else ""
        return f"{_DOES[self.kind]} update {self.update}{of_pass} of {_OF[self.caller]}{model}"


_NUM_COUNTS = 9  # fields between the caller and the terms


def _layout(num_terms: int, num_uses: int) -> struct.Struct:
    """Ten integers; four flags in one more; a kind and two floats for each term; a byte for each parameter."""
    return struct.Struct(f"<10q4?4x{num_terms * 'q2d'}{num_uses}B{-num_uses % 8}x")


def check_fit(messages: Sequence[Message]) -> None:
    """Checks that messages are for the same thing.

    Raises:
        RankError: two differ; all processes raise the same error, which names both.
    """
    first = messages[0]
    for other in messages:
        if _what(other) != _what(first):
            raise RankError(
                f"The processes are at different places: rank {first.sender} {first.place}, and rank {other.sender} "
                f"{other.place}. What they have cannot be added up; nothing was made of it. {_advice(first, other)}"
            )


def _what(message: Message) -> tuple[int, ...]:
    return message.kind, message.caller, message.update, message.passes, message.model


def _advice(one: Message, other: Message) -> str:
    if one.caller != other.caller and Caller.CHECKPOINT in (one.caller, other.caller):
        text = "Every process has to call save() and load(), at the same update: not inside of `if rank == 0`."
        if one.passes or other.passes:
            text += " With loaders of unequal length write `for window in accumulator.windows(loader):` around it."
        return text
    if one.model != other.model:
        return "Every process must train the same models, in the same order."
    if one.passes != other.passes:
        return (
            "A process has left its pass (a `break`, or an error that was caught) while others went on with theirs. "
            "Let all leave it at the same update."
        )
    if one.update != other.update:
        return (
            "They have had unequal numbers of batches, an update failed on one and not on the other, or they went on "
            "from different checkpoints. Give every process as many batches, or load the same checkpoint on all."
        )
    return "Every process must make the same calls, in the same order, with the same options."
