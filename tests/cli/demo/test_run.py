import pytest
import torch
from torch import nn

from gradaccum.cli.demo.run import Recorder, Run


def test_an_epochs_loss_is_the_mean_over_its_units() -> None:
    run = Run(
        losses=torch.tensor([1.0, 4.0, 2.0, 2.0], dtype=torch.float64),
        weights=torch.tensor([40.0, 20.0, 40.0, 20.0], dtype=torch.float64),
        parameters=torch.empty(4, 0),
        gradients=torch.empty(4, 0),
    )
    assert run.epoch_losses(2) == [2.0, 2.0]


def test_a_recorder_writes_down_what_the_optimizer_was_given_and_what_it_did() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    calls: list[None] = []
    recorder = Recorder(model, optimizer, lambda: calls.append(None))
    for gradient in (2.0, 4.0):
        model.weight.grad = torch.full((1, 1), gradient)
        recorder.saw(1.0, 3)
        recorder.saw(2.0, 1)
        optimizer.step()
        recorder.updated()
    run = recorder.run()
    assert run.gradients.tolist() == [[2.0], [4.0]]
    assert run.parameters.tolist() == [[0.0], [-2.0]]
    assert run.losses.tolist() == [1.25, 1.25]
    assert run.weights.tolist() == [4.0, 4.0]
    assert len(calls) == 2


def test_an_update_of_nothing_is_no_update() -> None:
    model = nn.Linear(1, 1)
    recorder = Recorder(model, torch.optim.SGD(model.parameters()), lambda: None)
    with pytest.raises(ZeroDivisionError):
        recorder.updated()
