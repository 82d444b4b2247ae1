"""How large a window is: one of two units, fixed or by a schedule."""

from typing import Any

import pytest

import gradaccum as ga
from gradaccum.window.window_size import WindowSize


def test_a_schedule_is_asked_for_each_update() -> None:
    asked: list[int] = []

    def doubled(update: int) -> int:
        asked.append(update)
        return 2**update

    size, fixed = WindowSize(batch_size=doubled), WindowSize(micro_batches=4)
    assert (size.counts_samples, size.is_fixed, fixed.counts_samples, fixed.is_fixed) == (True, False, False, True)
    assert fixed.at(1) == fixed.at(1000) == 4
    assert asked == [], "not before there is an update"
    assert [size.at(update) for update in (1, 2, 5)] == [2, 4, 32]
    assert asked == [1, 2, 5]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, "batch_size=None and micro_batches=None"),
        ({"micro_batches": 4, "batch_size": 32}, "batch_size=32 and micro_batches=4"),
    ],
)
def test_exactly_one_of_them(given: dict[str, Any], shown: str) -> None:
    message = f"{shown}: .*Pass exactly one: batch_size=, .*or micro_batches="
    with pytest.raises(ga.WindowError, match=message) as raised:
        WindowSize(**given)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None, float("nan")], ids=repr)
@pytest.mark.parametrize(("name", "unit"), [("micro_batches", "micro-batches"), ("batch_size", "samples")])
def test_a_size_that_is_none(name: str, unit: str, size: Any) -> None:
    message = rf"{name} is {size!r} for update 1: a window holds a whole number of {unit}, at least 1"
    if size is not None:
        with pytest.raises(ga.WindowError, match=message):
            WindowSize(**{name: size})
    with pytest.raises(ga.WindowError, match=message):
        WindowSize(**{name: lambda update: size}).at(1)


def test_a_schedule_that_goes_wrong_later_says_when() -> None:
    size = WindowSize(micro_batches=lambda update: 3 - update)
    assert size.at(2) == 1
    with pytest.raises(ga.WindowError, match="micro_batches is 0 for update 3"):
        size.at(3)


# ----------------------------------------------------------------------------------------------------- what is expected
@pytest.mark.parametrize(
    ("size", "samples", "target", "expected"),
    [
        pytest.param(WindowSize(micro_batches=3), 5, 3, [5, 5, 5], id="micro-batches"),
        pytest.param(WindowSize(micro_batches=2), None, 2, [None, None], id="rows unseen"),
        pytest.param(WindowSize(batch_size=12), 4, 12, [4, 4, 4], id="divides"),
        pytest.param(WindowSize(batch_size=10), 4, 10, [4, 4, 2], id="ragged"),
        pytest.param(WindowSize(batch_size=4), 4, 4, [4], id="the whole batch"),
        pytest.param(WindowSize(batch_size=4), 7, 4, [7], id="too large"),
        pytest.param(WindowSize(batch_size=4), 0, 4, [0], id="empty"),
        pytest.param(WindowSize(batch_size=4), None, 4, [None], id="rows unseen in a batch"),
    ],
)
def test_micro_batches_like_the_first(
    size: WindowSize, samples: int | None, target: int, expected: list[int | None]
) -> None:
    found = size.expected(samples, target=target)
    assert list(found.sizes) == expected
    assert found.samples == sum(rows or 0 for rows in expected)


@pytest.mark.parametrize(
    ("length", "per_window", "only_complete", "updates"),
    [
        (12, 4, False, 3),
        (13, 4, False, 4),
        (13, 4, True, 3),
        (3, 4, False, 1),
        (3, 4, True, 0),
        (0, 4, False, 0),
        (None, 4, True, None),
    ],
)
def test_updates_in_a_pass(length: int | None, per_window: int, only_complete: bool, updates: int | None) -> None:
    assert WindowSize(micro_batches=4).updates_in(length, per_window, only_complete=only_complete) == updates
    assert WindowSize(micro_batches=lambda _: 4).updates_in(length, per_window, only_complete=only_complete) is None


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("rows", "before", "message"),
    [
        (9, 0, r"A micro-batch of 9 samples is larger than batch_size=8"),
        (5, 5, r"do not add up to batch_size=8: there were 5 samples, and the next micro-batch has 5.*"
         r"of 10 samples, not 8\. Let the loader's batch size divide 8, or pass micro_batches=\."),
    ],
)  # fmt: skip
def test_a_micro_batch_that_does_not_fit_says_by_how_much(rows: int, before: int, message: str) -> None:
    with pytest.raises(ga.WindowError, match=message):
        WindowSize(batch_size=8).check_fits(rows, before=before, target=8)
    WindowSize(batch_size=8).check_fits(3, before=5, target=8)


def test_a_pass_that_is_too_short() -> None:
    assert str(WindowSize(micro_batches=4).too_short(3, target=4)).startswith(
        'The pass has 3 micro-batches, and with micro_batches=4 and tail="drop" no window is ever'
    )
    message = str(WindowSize(batch_size=12).too_short(3, target=12, samples=9))
    assert "3 micro-batches (9 samples), and with batch_size=12" in message
