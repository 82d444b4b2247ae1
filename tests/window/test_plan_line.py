"""The plan line says what will run."""

import pytest

from gradaccum.window.plan_line import plan_line


@pytest.mark.parametrize(
    ("sizes", "coupled", "updates", "line"),
    [
        ([16] * 16, 0, 391, "batch 256 = 16 micro-batches x 16 | exact | 391 updates an epoch"),
        ([4, 3, 3, 3], 0, None, "batch 13 = 4 micro-batches of 3 to 4 | exact"),
        ([8], 0, 1, "batch 8 = 1 micro-batch x 8 | exact | 1 update an epoch"),
        ([None] * 4, 0, 0, "4 micro-batches | exact | 0 updates an epoch"),
        ([None], 0, None, "1 micro-batch | exact"),
        ([2, 2], 3, None, "batch 4 = 2 micro-batches x 2 | not exact: 3 BatchNorm layers see the micro-batch"),
        ([2, 2], 1, None, "batch 4 = 2 micro-batches x 2 | not exact: 1 BatchNorm layer sees the micro-batch"),
        ([4], 3, None, "batch 4 = 1 micro-batch x 4 | exact"),
    ],
)
def test_the_plan_line(sizes: list[int | None], coupled: int, updates: int | None, line: str) -> None:
    assert plan_line(sizes, coupled_layers=coupled, updates_per_epoch=updates) == line
