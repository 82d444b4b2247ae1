"""One's own loop cuts nothing: a micro-batch may be anything, and its samples are counted, said, or asked about."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga


def pictures(*counts: int, size: int = 8) -> list[list[Tensor]]:
    return [[torch.randn(3, size, size, dtype=torch.float64) for _ in range(count)] for count in counts]


class Setup:
    def __init__(self, **options: Any) -> None:
        self.model = nn.Conv2d(3, 2, 3).double()
        self.gradients: list[Tensor] = []
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self.model.weight.grad.clone()))  # type: ignore[union-attr]
        self.accumulator = ga.Accumulator(self.model, optimizer, **options)

    def loss(self, some: list[Tensor]) -> Tensor:
        return torch.stack([self.model(one[None]).square().mean() for one in some]).mean()

    def of_all(self, batches: list[list[Tensor]]) -> Tensor:
        whole = [one for some in batches for one in some]
        return torch.autograd.grad(self.loss(whole), self.model.weight)[0]


@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"batch_size": 9}], ids=str)
def test_samples_are_counted_as_the_user_says(options: dict[str, int]) -> None:
    setup, batches = Setup(**options, samples=len), pictures(4, 3, 2)
    updates = [setup.accumulator.backward(setup.loss(some)) for some in setup.accumulator.over(batches)]
    assert [update and update.samples for update in updates] == [None, None, 9]
    torch.testing.assert_close(setup.gradients[0], setup.of_all(batches), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"batch_size": 9}], ids=str)
def test_samples_are_said_outside_of_a_pass(options: dict[str, int]) -> None:
    setup, batches = Setup(**options), pictures(4, 3, 2)
    updates = [setup.accumulator.backward(setup.loss(some), samples=len(some)) for some in batches]
    assert [update and update.samples for update in updates] == [None, None, 9]
    torch.testing.assert_close(setup.gradients[0], setup.of_all(batches), rtol=1e-12, atol=0)


ANYTHING: dict[str, Any] = {
    "pictures": pictures(6)[0],
    "detection": (torch.randn(2, 3, 4, 4), [{"boxes": torch.rand(n, 4)} for n in (2, 5, 1)]),
    "time first": (torch.randn(7, 2, 3), torch.randn(2)),
    "packed": {"input_ids": torch.ones(1, 9), "cu_seqlens": torch.tensor([0, 4, 9])},
    "patches": {"input_ids": torch.ones(2, 9), "pixel_values": torch.randn(24, 4)},
    "PackedSequence": nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]),
    "an object": object(),
    "sparse": {"x": torch.eye(3).to_sparse(), "y": torch.zeros(4)},
}


@pytest.mark.parametrize("name", ANYTHING)
def test_a_micro_batch_may_be_anything(name: str) -> None:
    setup, images = Setup(micro_batches=2), pictures(2, 3)
    for some, _ in zip(images, setup.accumulator.over([ANYTHING[name]] * 2), strict=True):
        update = setup.accumulator.backward(ga.Loss.mean(setup.loss(some), over=len(some)))
    assert update is not None
    assert (update.samples, update.micro_batch_size) == (None, None), "not known, so not guessed"
    torch.testing.assert_close(setup.gradients[0], setup.of_all(images), rtol=1e-12, atol=0)

    for some, _ in zip(images, Setup(micro_batches=2).accumulator.over([ANYTHING[name]] * 2), strict=False):
        with pytest.raises(ga.LossError, match=r"samples is not known.*samples=lambda micro_batch.*samples=n"):
            Setup(micro_batches=2).accumulator.backward(setup.loss(some))
        break


@pytest.mark.parametrize("name", ANYTHING)
def test_a_batch_size_asks_for_what_it_cannot_count(name: str) -> None:
    message = r"batch_size= counts samples.*could only be guessed.*samples=lambda"
    with pytest.raises(ga.LossError, match=message) as caught:
        next(iter(Setup(batch_size=4).accumulator.over([ANYTHING[name]] * 2)))
    assert "split=" not in str(caught.value), "which an accumulator does not have"
    setup = Setup(batch_size=4, samples=lambda _: 2)
    for some, _ in zip(pictures(2, 2), setup.accumulator.over([ANYTHING[name]] * 2), strict=True):
        update = setup.accumulator.backward(setup.loss(some))
    assert update is not None
    assert update.samples == 4


@pytest.mark.parametrize("wrong", [-1, 2.0, None, True, "2"], ids=repr)
def test_a_number_of_samples_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(ga.WindowError, match=r"samples\(micro_batch\) returned .*an int of at least 0"):
        next(iter(Setup(micro_batches=2, samples=lambda _: wrong).accumulator.over([1, 2])))
    if wrong is not None:
        setup = Setup(micro_batches=2)
        with pytest.raises(ga.WindowError, match=r"backward\(loss, samples=\) was given"):
            setup.accumulator.backward(setup.loss(pictures(2)[0]), samples=wrong)


def test_samples_is_a_function() -> None:
    with pytest.raises(ga.WindowError, match=r"samples=4: it is a function.*lambda micro_batch"):
        Setup(micro_batches=2, samples=4)


def test_a_number_that_is_not_what_was_counted() -> None:
    setup = Setup(batch_size=4, samples=len)
    for some in setup.accumulator.over(pictures(2, 2)):
        with pytest.raises(ga.WindowError, match=r"samples=3\) for a micro-batch that over\(\) has counted as 2"):
            setup.accumulator.backward(setup.loss(some), samples=3)
        break


def test_a_window_that_grows_too_large_outside_of_a_pass() -> None:
    setup = Setup(batch_size=4)
    setup.accumulator.backward(setup.loss(pictures(3)[0]), samples=3)
    with pytest.raises(ga.WindowError, match="do not add up to batch_size=4: there were 3 samples"):
        setup.accumulator.backward(setup.loss(pictures(3)[0]), samples=3)
    assert setup.accumulator.flush() is not None
