"""Messages arrive as they were sent, all of one length, and are refused where they are not for the same thing."""

import dataclasses
import math

import pytest

import gradaccum as ga
from gradaccum.sync.messages import Kind, Message, Outcome, TermKind, TermShare, check_fit

CLOSING = Message(
    Outcome.OUT_OF_MEMORY,
    Kind.CLOSING_A_WINDOW,
    update=7,
    model=2**32 - 1,
    micro_batches=3,
    samples=13,
    largest=5,
    has_new_terms=True,
    terms=[TermShare(TermKind.ON_HOST, 0.1, math.inf), TermShare(TermKind.PLAIN_SUM, 0.0, -1e-300)],
    uses=[2, 0, 1],
)
FAILED = Message(Outcome.FAILED, Kind.FAILURE, 0, 5)
LAYOUT = {"num_terms": 2, "num_uses": 9}


@pytest.mark.parametrize(
    "message", [CLOSING, FAILED, dataclasses.replace(FAILED, is_done=True, has_unknown_sizes=True)]
)
def test_they_arrive_as_they_were_sent(message: Message) -> None:
    numbers = message.to_numbers(**LAYOUT)
    assert len(numbers) == 8 + 3 * 2 + 2, "whatever they are about"
    assert all(type(number) is int and -(2**63) <= number < 2**63 for number in numbers)
    terms = [*message.terms, *[TermShare()] * (2 - len(message.terms))]
    uses = [*message.uses, *[0] * (9 - len(message.uses))]
    assert Message.from_numbers(numbers, **LAYOUT) == dataclasses.replace(message, terms=terms, uses=uses)


@pytest.mark.parametrize(
    "other", [{"kind": Kind.OPENING_A_WINDOW}, {"update": 8}, {"model": 5}], ids=lambda change: next(iter(change))
)
def test_what_does_not_fit_is_one_error_that_names_both(other: dict[str, int]) -> None:
    check_fit([CLOSING, dataclasses.replace(CLOSING, samples=0, is_done=True)])
    message = dataclasses.replace(CLOSING, **other)
    with pytest.raises(ga.RankError) as caught:
        check_fit([CLOSING, CLOSING, message])
    assert f"rank 0 is {CLOSING.place}, and rank 2 is {message.place}" in str(caught.value)
    assert "closing a window for update 7 of model ffffffff" in str(caught.value)
