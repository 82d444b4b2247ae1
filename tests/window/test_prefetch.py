"""Micro-batches on their way to the device: each once, in order, in its own structure, and never all at a time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gradaccum.window.prefetch import on_device

CPU, META = torch.device("cpu"), torch.device("meta")


class Source:
    """Micro-batches that are cut as they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.count):
            self.asked += 1
            yield {"x": torch.full((2, 3), float(i)), "more": (torch.tensor(i), ["a", "b"])}


def test_on_the_host_they_are_handed_on_and_nothing_runs_ahead() -> None:
    originals = [{"x": torch.zeros(2)}, {"x": torch.ones(2)}]
    moved = list(on_device(originals, CPU))
    assert [batch["x"] is original["x"] for batch, original in zip(moved, originals, strict=True)] == [True, True]
    for count in (0, 1, 3):
        source, seen = Source(count), 0
        for batch in on_device(source, CPU):
            assert batch["x"][0, 0] == seen
            seen += 1
            assert source.asked == seen
        assert seen == count


def test_to_another_device() -> None:
    for batch in on_device(Source(2), META):
        assert batch["x"].device == batch["more"][0].device == META
        assert batch["more"][1] == ["a", "b"]


def test_an_error_of_the_source() -> None:
    def source() -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise OSError("disk")

    batches = on_device(source(), CPU)
    assert next(batches).shape == (2,)
    with pytest.raises(OSError, match="disk"):
        next(batches)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_cuda_one_is_ahead_and_all_arrive(count: int) -> None:
    source, device = Source(count), torch.device("cuda", 0)
    for i, batch in enumerate(on_device(source, device)):
        assert source.asked == min(i + 2, count), "one ahead of the one in use, and no more"
        assert batch["x"].device == batch["more"][0].device == device
        assert batch["x"].eq(i).all()
        assert batch["more"][0] == i
        assert batch["more"][1] == ["a", "b"]


@pytest.mark.gpu
def test_on_cuda_what_is_there_already_is_not_copied() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(3, device=device)
    [batch] = on_device([{"x": x, "y": torch.ones(3)}], device)
    assert batch["x"] is x
    assert batch["y"].device == device


@pytest.mark.gpu
def test_on_cuda_memory_is_not_reused_too_early() -> None:
    """The copies are large and the work on them slow, so that a block freed too early would be overwritten."""
    device = torch.device("cuda", 0)
    source = (torch.full((1 << 22,), float(i)) for i in range(20))
    sums = []
    for batch in on_device(source, device):
        torch.cuda._sleep(2_000_000)
        sums.append(batch.sum() / batch.numel())
        del batch
    assert [int(total) for total in sums] == list(range(20))
