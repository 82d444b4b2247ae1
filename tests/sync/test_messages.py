"""Messages arrive as they were sent, all of one length, and are refused where they are not for the same thing."""

import dataclasses
import math
from typing import Any

import pytest

import gradaccum as ga
from gradaccum.sync.messages import PREFIX, Caller, Kind, Message, Outcome, TermKind, TermShare, check_fit

CLOSING = Message(
    Outcome.OUT_OF_MEMORY,
    Kind.CLOSING_A_WINDOW,
    update=7,
    model=2**32 - 1,
    sender=4,
    passes=2,
    micro_batches=3,
    samples=13,
    largest=5,
    has_new_terms=True,
    terms=[TermShare(TermKind.ON_HOST, 0.1, math.inf), TermShare(TermKind.PLAIN_SUM, 0.0, -1e-300)],
    uses=[2, 0, 1],
)
FAILED = Message(Outcome.FAILED, Kind.FAILURE, 0, 5)
LAYOUT = {"num_terms": 14, "num_uses": 9}


@pytest.mark.parametrize(
    "message", [CLOSING, FAILED, dataclasses.replace(FAILED, is_done=True, has_unknown_sizes=True)]
)
def test_they_arrive_as_they_were_sent(message: Message) -> None:
    numbers = message.to_numbers(**LAYOUT)
    assert len(numbers) == 11 + 3 * 14 + 2, "whatever they are about"
    assert all(type(number) is int and -(2**63) <= number < 2**63 for number in numbers)
    terms = [*message.terms, *[TermShare()] * (14 - len(message.terms))]
    uses = [*message.uses, *[0] * (9 - len(message.uses))]
    assert Message.from_numbers(numbers, **LAYOUT) == dataclasses.replace(message, terms=terms, uses=uses)


def test_every_header_can_be_read_whatever_follows() -> None:
    for message in (CLOSING, FAILED):
        for num_terms, num_uses in ((2, 9), (14, 9), (2, 1000)):
            numbers = message.to_numbers(num_terms=num_terms, num_uses=num_uses)
            assert len(numbers) >= PREFIX
            header = Message.from_numbers(numbers[:PREFIX], num_terms=0, num_uses=0)
            assert header == dataclasses.replace(message, terms=[], uses=[])


@pytest.mark.parametrize(
    ("other", "advice"),
    [
        ({"kind": Kind.OPENING_A_WINDOW}, "make the same calls"),
        ({"caller": Caller.BACKWARD}, "make the same calls"),
        ({"caller": Caller.CHECKPOINT, "kind": Kind.SAVING}, "not inside of `if rank == 0`"),
        ({"update": 8}, "unequal numbers of batches"),
        ({"passes": 3}, "has left its pass"),
        ({"model": 5}, "the same models, in the same order"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_both(other: dict[str, Any], advice: str) -> None:
    check_fit([CLOSING, dataclasses.replace(CLOSING, samples=0, is_done=True)])
    message = dataclasses.replace(CLOSING, sender=6, **other)
    with pytest.raises(ga.RankError) as caught:
        check_fit([CLOSING, CLOSING, message])
    assert f"rank 4 {CLOSING.place}, and rank 6 {message.place}" in str(caught.value)
    assert advice in str(caught.value)
    assert "closes the window of update 7, in pass 2 over its loader, of an Accumulator" in str(caught.value)
