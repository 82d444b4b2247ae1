import pytest
import torch

from gradaccum.fit.findings import default_sizes, first_that_runs, sizes_to_accumulate


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [
        (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (100, [1, 2, 4, 8, 16, 32, 64, 100]),
        (256, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
    ],
)  # fmt: skip
def test_powers_of_two_and_the_whole(batch_size: int, sizes: list[int]) -> None:
    assert default_sizes(batch_size) == sizes


def test_not_every_power_of_two_of_a_huge_batch() -> None:
    sizes = default_sizes(1_000_000)
    assert len(sizes) == 13
    assert sizes[-2:] == [2**19, 1_000_000]


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [([1], 1, [1, 2]), ([1, 2], 2, [1, 2]), ([1, 2, 4], 4, [1, 2]), ([5], 16, [1, 5]), ([16], 16, [1, 2]),
     ([1, 16], 16, [1, 2]), ([2, 8, 16], 16, [2, 8])],
)  # fmt: skip
def test_two_sizes_at_least_to_make_a_line_of(sizes: list[int], batch_size: int, expected: list[int]) -> None:
    assert sizes_to_accumulate(sizes, batch_size) == expected


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
