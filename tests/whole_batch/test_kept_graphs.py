"""How many graphs are kept, by what is left of the device."""

import pytest
import torch
from torch import nn

from gradaccum.whole_batch.kept_graphs import KeptGraphs

CPU = torch.device("cpu")
GRADIENTS = 4 * (3 * 2 + 2)


def deciding(monkeypatch: pytest.MonkeyPatch, left: int | None) -> KeptGraphs:
    monkeypatch.setattr("gradaccum.whole_batch.kept_graphs.available_bytes", lambda device: left)
    kept = KeptGraphs([nn.Linear(3, 2)])
    kept.counted(1000, rows=10, elements=7)  # 100 bytes a row
    return kept


@pytest.mark.parametrize(
    ("left", "number"),
    [
        (GRADIENTS + 2 * 4000, 4),  # all
        (GRADIENTS + 2 * 3999, 2),  # 1,000 for the one that runs again, and 2,999 for those that are kept
        (GRADIENTS + 2 * 2000, 1),
        (GRADIENTS + 2 * 1999, 0),
        (GRADIENTS, 0),
        (GRADIENTS - 2 * 5000, 0),
        (None, 4),  # where nobody tells
    ],
)
def test_as_many_as_fit_beside_one_that_runs_again(
    monkeypatch: pytest.MonkeyPatch, left: int | None, number: int
) -> None:
    assert deciding(monkeypatch, left).number([10, 10, 10, 10], CPU) == number


def test_a_number_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradaccum.whole_batch.kept_graphs.available_bytes", pytest.fail)
    kept = KeptGraphs([], at_most=3)
    assert kept.is_known(5)
    assert [kept.number([1] * n, CPU) for n in (2, 3, 4)] == [2, 3, 3]


def test_longer_samples_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = deciding(monkeypatch, 0)
    assert kept.is_known(7)
    assert kept.is_known(3), "shorter ones take less"
    assert not kept.is_known(8)
    assert not KeptGraphs([]).is_known(1)


def test_less_after_a_failure_and_more_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = deciding(monkeypatch, GRADIENTS + 2 * 4000)
    sizes = [10] * 4
    assert kept.number(sizes, CPU) == 4
    kept.failed(CPU)
    assert kept.number(sizes, CPU) == 1
    for _ in range(63):
        kept.succeeded()
    assert kept.number(sizes, CPU) == 1
    kept.succeeded()
    assert kept.number(sizes, CPU) == 4
