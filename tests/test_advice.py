"""`advise`: the model of McCandlish 2018 in words, and nothing where nothing was measured."""

import math

import pytest
import torch
from torch import Tensor, nn

import gradaccum as ga


def test_quotients_are_those_of_the_paper() -> None:
    """Equations 2.11 and 5.1, for N = 300 and B = 100: twice the batch takes 2.5 / 4 of the updates."""
    text = ga.advise(300.0, batch_size=100)
    assert "a batch of 200: 0.62 times as many updates, 1.25 times as many samples" in text
    assert "a batch of 50: 1.75 times as many updates, 0.88 times as many samples" in text
    assert "a batch of 200 would take about 25% more time" in text


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (1_000.0, "4 times the batch of 250: the batch is well below it"),
        (300.0, "the batch of 250 is near it"),
        (50.0, "0.2 of the batch of 250: the batch is beyond it"),
        (0.0, "the batch is beyond it"),
        (math.inf, "noise alone, no gradient"),
    ],
)
def test_is_marked_as_indicative_with_its_sources(scale: float, said: str) -> None:
    text = ga.advise(scale, batch_size=250)
    assert said in text
    assert "Indicative only" in text
    assert "arXiv:1812.06162" in text
    assert "arXiv:2410.21676" in text
    assert "nan" not in text


def test_takes_an_update() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 3).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=8, noise_scale=True)
    updates = [step(torch.randn(40, 3)) for _ in range(20)]
    assert "the batch of 40" in ga.advise(updates[-1])
    assert "the batch of 10" in ga.advise(updates[-1], batch_size=10)


def test_without_a_measurement() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ga.TrainStep(model, optimizer, lambda model, x: model(x).mean(), micro_batch_size=8)
    with pytest.raises(ga.MisuseError, match="Pass noise_scale=True"):
        ga.advise(step(torch.randn(40, 3)))
    with pytest.raises(ga.WindowError, match=r"batch_size=None.*ga.advise\(update, batch_size=40\)"):
        ga.advise(300.0)
    with pytest.raises(ga.WindowError, match="A noise scale of nan"):
        ga.advise(math.nan, batch_size=4)
