"""The messages between processes: what each of them says, and how it travels as 64-bit integers.

Every message has the same fields and, at any one time, the same length on all processes. So one that has failed can say
so without knowing what the others are about to exchange. The header says how it went on the sender, what the message is
for, of which update and of which models; the rest is used only if all headers agree (`check_fit`). Objects and tensors
have no header, so they are exchanged only right after messages that agreed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from gradaccum.errors import RankError


class Outcome(IntEnum):
    """How it went on one process; of several processes the largest counts."""

    FINE = 0
    OUT_OF_MEMORY = 1
    FAILED = 2


class Kind(IntEnum):
    """What a message is for: where its sender is in an update."""

    FAILURE = 0
    OPENING_A_WINDOW = 1
    RUNNING_A_MICRO_BATCH = 2
    EXCHANGING_OUTPUTS_OR_STATISTICS = 3
    LOOKING_FOR_A_MICRO_BATCH_SIZE = 4
    CLOSING_A_WINDOW = 5
    LOOKING_AT_A_FEW_ROWS = 6


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
    """What one process says to all others, fields in the order in which they travel; the first four are the header."""

    outcome: Outcome
    kind: Kind
    update: int  # its index, from 1
    model: int  # checksum of the parameters' names, shapes and dtypes
    micro_batches: int = 0  # of the sender in this window
    samples: int = 0  # their rows; or another number, where the message is for comparing that
    largest: int = 0  # rows of the largest micro-batch
    is_done: bool = False  # the sender has nothing more to add but the micro-batch that it is about to run, if any
    has_new_terms: bool = False  # its loss has terms for which messages have no place yet
    has_unknown_sizes: bool = False  # rows of some micro-batch could not be counted
    terms: Sequence[TermShare] = ()  # in the order on which the processes have agreed
    uses: Sequence[int] = ()  # of each parameter, see `flat.Use`

    def to_numbers(self, *, num_terms: int, num_uses: int) -> list[int]:
        """The message as integers, as many as every process sends with these numbers of terms and parameters."""
        terms = [*self.terms, *[TermShare()] * (num_terms - len(self.terms))]
        packed = _layout(num_terms, num_uses).pack(
            *(self.outcome, self.kind, self.update, self.model, self.micro_batches, self.samples, self.largest),
            *(self.is_done, self.has_new_terms, self.has_unknown_sizes),
            *(number for term in terms for number in term),
            *self.uses,
            *[0] * (num_uses - len(self.uses)),
        )
        return list(struct.unpack(f"<{len(packed) // 8}q", packed))

    @staticmethod
    def from_numbers(numbers: Sequence[int], *, num_terms: int, num_uses: int) -> Message:
        """The message from what `to_numbers` made of it."""
        outcome, kind, *others = _layout(num_terms, num_uses).unpack(struct.pack(f"<{len(numbers)}q", *numbers))
        counts, rest = others[:_NUM_COUNTS], others[_NUM_COUNTS:]
        terms = [TermShare(TermKind(rest[i]), *rest[i + 1 : i + 3]) for i in range(0, 3 * num_terms, 3)]
        return Message(Outcome(outcome), Kind(kind), *counts, terms=terms, uses=rest[3 * num_terms :])

    @property
    def place(self) -> str:
        """The header in words, for errors."""
        return f"{self.kind.name.lower().replace('_', ' ')} for update {self.update} of model {self.model:08x}"


_NUM_COUNTS = 8  # fields between the kind and the terms


def _layout(num_terms: int, num_uses: int) -> struct.Struct:
    """Seven integers; three flags in one more; a kind and two floats for each term; a byte for each parameter."""
    return struct.Struct(f"<7q3?5x{num_terms * 'q2d'}{num_uses}B{-num_uses % 8}x")


def check_fit(messages: Sequence[Message]) -> None:
    """Checks that messages, by rank, are for the same thing.

    Raises:
        RankError: two differ; all processes raise the same error, which names both.
    """
    first = messages[0]
    for rank, other in enumerate(messages):
        if (other.kind, other.update, other.model) != (first.kind, first.update, first.model):
            raise RankError(
                f"The processes are at different places: rank 0 is {first.place}, and rank {rank} is {other.place}. "
                "What they have cannot be added up; no update was made. Every process must train the same models, in "
                "the same order, with the same options, and go on from the same checkpoint."
            )
