"""Loaders that cannot be read one item ahead are refused before they do harm; all others are let be."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga

MODEL = nn.Linear(3, 2)


def tensor_refilled() -> Iterator[Any]:
    buffer = torch.empty(4, 3)
    for i in range(5):
        yield buffer.fill_(float(i))


def array_refilled() -> Iterator[Any]:
    buffer = np.zeros((4, 3), dtype=np.float32)
    for i in range(5):
        buffer[:] = i
        yield torch.from_numpy(buffer)


def nested_refilled() -> Iterator[Any]:
    target, buffer = torch.zeros(4), torch.empty(3, 4).t()
    for _ in range(5):
        buffer.normal_()
        yield {"x": buffer, "y": target}


def from_forwards() -> Iterator[Any]:
    for _ in range(5):
        with torch.no_grad():
            made = MODEL(torch.randn(4, 3))
        yield torch.cat([made, made[:, :1]], dim=1)


def from_weights() -> Iterator[Any]:
    for _ in range(5):
        yield MODEL.weight.data.clone().repeat(2, 1)


def in_turn() -> Iterator[Any]:
    buffers = torch.empty(4, 3), torch.empty(4, 3)
    for i in range(7):
        yield buffers[i % 2].fill_(float(i))


def one_object() -> Iterator[Any]:
    yield from [torch.full((4, 3), float("nan")).nan_to_num()] * 5


def views_changed_in_turn() -> Iterator[Any]:
    whole = torch.randn(20, 3)
    for i in range(5):
        yield whole[4 * i : 4 * i + 4].mul_(2)


def from_another_model() -> Iterator[Any]:
    teacher = nn.Linear(3, 3)
    for _ in range(5):
        made = teacher(torch.randn(4, 3)).detach()
        yield made


def from_what_a_model_is() -> Iterator[Any]:
    for _ in range(5):
        weight = next(MODEL.parameters())
        yield torch.randn(4, weight.shape[1], device=weight.device, dtype=weight.dtype)


def accumulator(**options: Any) -> ga.Accumulator:
    return ga.Accumulator(MODEL, torch.optim.SGD(MODEL.parameters(), lr=0.1), **{"micro_batches": 2, **options})


def x_of(item: Any) -> Tensor:
    return item["x"] if isinstance(item, dict) else item


def train(one: ga.Accumulator, items: Any) -> int:
    for item in one.over(items):
        one.backward(MODEL(x_of(item)).square().mean())
    return one.updates


@pytest.mark.parametrize("items", [tensor_refilled, array_refilled, nested_refilled])
def test_memory_that_is_filled_again(items: Callable[[], Iterator[Any]]) -> None:
    one, before = accumulator(), MODEL.weight.detach().clone()
    with pytest.raises(ga.MisuseError, match=r"fills the memory of one micro-batch again.*buffer\.clone\(\)"):
        train(one, items())
    assert one.updates == 0
    assert torch.equal(MODEL.weight, before)
    copies = [{"x": x_of(item).clone()} for item in items()]
    assert train(accumulator(), iter(copies)) == 3, "what the message says to type"


def test_a_window_that_is_read_ahead_needs_more_buffers() -> None:
    one = accumulator(micro_batches=3, weights=len)
    with pytest.raises(ga.MisuseError, match="fills the memory"):
        train(one, in_turn())


@pytest.mark.parametrize("items", [from_forwards, from_weights])
def test_items_that_are_computed_with_the_model(items: Callable[[], Iterator[Any]]) -> None:
    with pytest.raises(ga.MisuseError, match=r"the weights before that update.*compute them in the loop"):
        train(accumulator(), items())


@pytest.mark.parametrize(
    "items", [in_turn, one_object, views_changed_in_turn, from_another_model, from_what_a_model_is]
)
def test_what_can_be_read_ahead(items: Callable[[], Iterator[Any]]) -> None:
    assert train(accumulator(), items()) in (3, 4)


def test_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(torch.randn(23, 3), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    assert train(accumulator(), loader) == 3


# ------------------------------------------------------------------------------------------------------- passes again
def test_a_finished_pass_is_a_new_pass() -> None:
    one, items = accumulator(), [torch.randn(4, 3) for _ in range(5)]
    epoch = one.over(items)
    for number in (1, 2, 3):
        assert [bool(one.backward(MODEL(x).mean())) for x in epoch] == [False, True, False, True, True]
        assert one.updates == 3 * number
    assert train(one, epoch) == 12, "handed to over() again it is its loader"


def test_two_accumulators_on_a_finished_pass() -> None:
    other = nn.Linear(3, 2)
    one, two = accumulator(), ga.Accumulator(other, torch.optim.SGD(other.parameters(), lr=0.1), micro_batches=3)
    epoch = two.over(one.over([torch.randn(4, 3) for _ in range(5)]))
    for _ in range(2):
        for x in epoch:
            one.backward(MODEL(x).mean())
            two.backward(other(x).mean())
    assert (one.updates, two.updates) == (6, 4)


def test_a_loop_that_was_left_goes_on() -> None:
    one = accumulator()
    epoch, seen = one.over(torch.randn(5, 4, 3)), []
    for _ in range(2):
        for x in epoch:
            seen.append(one.backward(MODEL(x).mean()))
            if len(seen) == 2:
                break
    assert [bool(update) for update in seen] == [False, True, False, True, True]


def test_a_loop_over_the_pass_in_its_own_loop() -> None:
    one = accumulator()
    epoch = one.over(torch.randn(5, 4, 3))

    def train_nested() -> None:
        for x in epoch:
            one.backward(MODEL(x).mean())
            for y in epoch:
                one.backward(MODEL(y).mean())

    with pytest.raises(ga.MisuseError, match="inside of a loop over itself"):
        train_nested()


def test_another_pass_in_the_loop_of_one() -> None:
    one = accumulator(micro_batches=1)

    def train_nested() -> None:
        for i, x in enumerate(one.over(torch.randn(10, 4, 3))):
            one.backward(MODEL(x).mean())
            if i == 2:
                train(one, torch.randn(2, 4, 3))

    with pytest.raises(ga.MisuseError, match=r"ended by another over\(\).*rest of its micro-batches"):
        train_nested()
