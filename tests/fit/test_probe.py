"""Which sizes are run, and with which rows."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import gradaccum as ga
from gradaccum.fit.probe import first_that_runs, sizes_to_accumulate, some_rows
from gradaccum.fit.workload import Workload
from gradaccum.memory.fakes import fake_input, fake_mode

ENOUGH = {(1,): [1, 2], (1, 2): [1, 2], (1, 2, 4): [1, 2], (5, 16): [5, 1], (2, 8, 16): [2, 8], (1, 16): [1, 2]}


@pytest.mark.parametrize(("sizes", "expected"), ENOUGH.items())
def test_two_sizes_at_least_to_make_a_line_of(sizes: tuple[int, ...], expected: list[int]) -> None:
    assert sizes_to_accumulate(sizes, sizes[-1]) == sorted(expected)
    assert sizes_to_accumulate([5], 16) == [1, 5]
    assert sizes_to_accumulate([16], 16) == [1, 2]


def test_a_single_sample_may_fail() -> None:
    ran: list[int] = []

    def run(size: int) -> None:
        ran.append(size)
        if size == 1:
            raise ValueError("Expected more than 1 value per channel\nand more")

    sizes, note = first_that_runs([1, 2, 4], run)
    assert (ran, sizes) == ([1, 2], [2, 4])
    assert note == "A single sample cannot be run by itself: Expected more than 1 value per channel"
    assert first_that_runs([1, 2], run)[0] == [2, 3]
    assert first_that_runs([2, 4], run) == ([2, 4], None)


@pytest.mark.parametrize(
    ("sizes", "error"), [([1, 2], torch.OutOfMemoryError), ([2, 4], ValueError), ([1, 2], ValueError)]
)
def test_other_failures_pass_through(sizes: list[int], error: type[Exception]) -> None:
    def run(size: int) -> None:
        raise error("x")

    with pytest.raises(error):
        first_that_runs(sizes, run)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_as_many_rows_as_asked_for(size: int) -> None:
    x = torch.arange(20.0).view(4, 5)
    batch = {"x": x, "names": ["a", "b", "c", "d"], "scale": 2, "y": (torch.zeros(4, dtype=torch.int64),)}
    mode = fake_mode()
    own = functools.partial(fake_input, mode=mode, device=torch.device("cpu"))
    work = Workload.checked(nn.Linear(5, 1), lambda model, batch: 0, batch, forward=None, batch_loss=None)
    for fake in (some_rows(work, size, own), some_rows(work, size, torch.clone)):
        assert (fake["x"].shape, fake["y"][0].shape, len(fake["names"]), fake["scale"]) == ((size, 5), (size,), size, 2)
        assert fake["x"].untyped_storage().nbytes() == size * 5 * 4, "its own rows, not the batch's"
    assert torch.equal(fake["x"], x[torch.arange(size) % 4])
    assert isinstance(some_rows(work, size, own)["x"], FakeTensor)


def test_samples_that_stay_together_are_taken_as_the_split_cuts_them() -> None:
    split = ga.split_by_samples(groups=lambda x: torch.arange(len(x)) // 2)
    work = Workload.checked(
        nn.Linear(5, 1), lambda model, x: 0, torch.arange(20.0).view(4, 5), forward=None, batch_loss=None, split=split
    )
    assert [len(some_rows(work, size, torch.clone)) for size in (1, 2, 3, 4)] == [2, 2, 2, 4]
