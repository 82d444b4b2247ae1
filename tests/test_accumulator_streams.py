"""One pass over a stream: what is asked of it, when, and what becomes of its errors and of what was read ahead."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import gradaccum as ga


class Asked:
    """A stream that keeps a record of what was asked of it."""

    def __init__(self, items: Iterable[Any], fails_at: int | None = None) -> None:
        self.items, self.fails_at = items, fails_at
        self.log: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        self.log.append("begun")
        for i, item in enumerate(self.items):
            if i == self.fails_at:
                raise OSError("disk gone")
            self.log.append(item)
            yield item


def make(**options: Any) -> ga.Accumulator:
    model = nn.Linear(1, 1)
    return ga.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"micro_batches": 2, **options})


def backward(accumulator: ga.Accumulator, over: float = 1) -> ga.Update | None:
    (model,) = accumulator._accumulation.models
    return accumulator.backward(ga.Loss.mean(model(torch.ones(1, 1)).mean(), over=over))


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.ones(5, 1)


def test_a_data_loader_without_a_length() -> None:
    accumulator, sizes = make(), []
    with pytest.raises(TypeError):
        len(accumulator.over(iter([1, 2, 3])))
    assert len(accumulator.over([1, 2, 3])) == 3
    for x in accumulator.over(DataLoader(Endless(), batch_size=2)):
        sizes.append(len(x))
        update = backward(accumulator, over=len(x))
    assert sizes == [2, 2, 1]
    assert update is not None
    assert update.samples == 1


# Totals ahead: with weights= a whole window is read before its first backward.


def test_with_weights_a_window_is_read_ahead_and_no_further() -> None:
    stream = Asked([1.0, 2.0, 3.0, 4.0, 5.0])
    accumulator = make(micro_batches=2, weights=lambda item: item)
    read: list[int] = []
    weights: list[Any] = []
    for item in accumulator.over(stream):
        read.append(len(stream.log) - 1)
        update = backward(accumulator, over=item)
        if update:
            weights.append(update.weight)
    assert read == [2, 3, 4, 5, 5]
    assert weights == [3.0, 7.0, 5.0]


def test_with_weights_an_error_of_the_stream_comes_in_its_place() -> None:
    stream = Asked([1.0, 2.0, 3.0, 4.0], fails_at=3)
    accumulator = make(micro_batches=2, weights=lambda item: item)
    seen: list[float] = []

    def train() -> None:
        for item in accumulator.over(stream):
            seen.append(item)
            backward(accumulator, over=item)

    with pytest.raises(OSError, match="disk gone"):
        train()
    assert seen == [1.0, 2.0, 3.0]
    assert accumulator.updates == 1


# Several that follow one pass.


def test_a_pass_that_two_follow_is_read_once() -> None:
    stream = Asked("abcde")
    first, second = make(micro_batches=2), make(micro_batches=3)
    updates: list[tuple[int, int]] = []
    for _ in second.over(first.over(stream)):
        backward(first)
        backward(second)
        updates.append((first.updates, second.updates))
    assert stream.log == ["begun", *"abcde"]
    assert updates == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 2)]


def test_a_stream_that_two_follow_is_continued() -> None:
    stream = iter("abcdef")
    first, second = make(), make()
    seen: list[str] = []
    for _ in range(3):
        for item in second.over(first.over(stream)):
            seen.append(item)
            backward(first)
            if backward(second):
                break
    assert "".join(seen) == "abcdef"
    assert first.updates == second.updates == 3


def test_a_stop_iteration_of_ones_own_does_not_end_the_pass_in_silence() -> None:
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(make(weights=lambda _: next(iter(()))).over([torch.ones(1, 2)] * 2))
