"""``torch.compile``: compiled models train as they are, and a smaller last micro-batch costs no compilation more."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
from oracle import EXACT, assert_same_gradients, gradients_of

ROWS, FEATURES = 23, 4


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float32])
@pytest.mark.parametrize("fused", ["auto", True, False])
def test_the_gradient_is_the_whole_batchs_and_sizes_compile_at_most_twice(
    fused: Any, accumulate_dtype: torch.dtype | None
) -> None:
    torch._dynamo.reset()
    batch = torch.randn(ROWS, FEATURES, dtype=torch.float64), torch.randint(3, (ROWS,))
    whole = make()
    loss_fn(whole, batch).backward()
    model = make()
    compilations: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted)
    step = ga.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda _, micro_batch: loss_fn(compiled, micro_batch),
        micro_batch_size=4,  # 23 rows: pieces of 4 and of 3
        fused=fused,
        accumulate_dtype=accumulate_dtype,
    )
    step.backward(batch)
    assert_same_gradients(gradients_of(model), gradients_of(whole), tolerance=EXACT)
    assert len(compilations) <= 2  # one for the first size, one for any size
    model.zero_grad()
    step((batch[0][:10], batch[1][:10]))
    step((batch[0][:21], batch[1][:21]))
    assert len(compilations) <= 2
    torch._dynamo.reset()
