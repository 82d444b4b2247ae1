"""Each way against the slow and obvious: the gradient of a window, written out."""

import pytest
import torch
from torch import Tensor, nn

from gradaccum.cli.demo import ways
from gradaccum.cli.demo.regression import regression_task
from gradaccum.cli.demo.speeches import PADDING, speeches_task
from gradaccum.cli.demo.task import Task

REGRESSION = regression_task(57, title="", text="")  # 40 and 10 + 7
TEXT = speeches_task(title="", text="", num_speeches=21)  # 21 of 32: 8 + 8 + 5


def whole_gradient(task: Task, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(task.criterion(model(batch[0]), batch[1]), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("way", [ways.whole_batch, ways.library], ids=["whole batch", "library"])
@pytest.mark.parametrize("task", [REGRESSION, TEXT], ids=["regression", "text"])
def test_every_update_has_the_whole_batchs_gradient(task: Task, way: ways.Way) -> None:
    run = way(task, torch.float64, lambda: None)
    model = task.model().double()
    batches = list(task.loader(task.batch_size, torch.float64)) * task.epochs
    torch.testing.assert_close(run.gradients[0], whole_gradient(task, batches[0], model), rtol=1e-12, atol=1e-15)
    for update in range(1, task.updates):
        nn.utils.vector_to_parameters(run.parameters[update - 1], model.parameters())
        expected = whole_gradient(task, batches[update], model)
        torch.testing.assert_close(run.gradients[update], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("task", [REGRESSION, TEXT], ids=["regression", "text"])
def test_the_textbook_loop_has_the_mean_of_means(task: Task) -> None:
    run = ways.textbook_loop(task, torch.float64, lambda: None)
    model = task.model().double()
    micro_batches = list(task.loader(task.micro_batch_size, torch.float64))[: task.micro_batches]
    expected = sum(whole_gradient(task, micro_batch, model) for micro_batch in micro_batches) / task.micro_batches
    torch.testing.assert_close(run.gradients[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("way", [ways.whole_batch, ways.textbook_loop, ways.library])
def test_losses_are_means_over_units(way: ways.Way) -> None:
    run = way(TEXT, torch.float64, lambda: None)
    ((x, y),) = TEXT.loader(TEXT.batch_size, torch.float64)
    assert run.weights[0] == int((y != PADDING).sum())
    expected = float(TEXT.criterion(TEXT.model().double()(x), y).detach())
    assert float(run.losses[0]) == pytest.approx(expected, rel=1e-12)


def test_float32_stays_float32() -> None:
    run = ways.library(REGRESSION, torch.float32, lambda: None)
    assert torch.equal(run.parameters, run.parameters.float().double())
