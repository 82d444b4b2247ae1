"""On a GPU: gradients of real CUDA graphs, which torch.compile replays, add up in memory that stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from oracle import SINGLE, assert_same_gradients, doubled, parameters_of, whole_batches

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's compiler has warnings of its own

ROWS, FEATURES = 12, 16


def mse(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])  # not in the graph, whose memory is overwritten


def test_replayed_graphs_add_up() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 4)).cuda()
    expected = doubled(model)
    optimizer, right = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, expected))
    # The first micro-batch warms up, the second is recorded, and the others are replayed.
    batches = [(torch.randn(ROWS, FEATURES).cuda(), torch.randn(ROWS, 4).cuda()) for _ in range(4)]
    replayed = torch.compile(model, mode="reduce-overhead", dynamic=False)
    train_step = ga.TrainStep(
        model, optimizer, lambda _, batch: mse(replayed, batch), micro_batch_size=4, persistent_gradients=True
    )
    for batch in batches:
        torch.compiler.cudagraph_mark_step_begin()
        train_step(batch)
    whole_batches(expected, right, [(x.double(), y.double()) for x, y in batches], mse)
    made = {name: value.double() for name, value in parameters_of(model).items()}
    assert_same_gradients(made, parameters_of(expected), tolerance=SINGLE)
