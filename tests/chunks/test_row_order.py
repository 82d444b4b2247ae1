"""Every row once, but those that are known to add nothing."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradaccum.chunks.row_order import Ignored, RowOrder, ignored_by
from gradaccum.losses.loss import Loss

LABELS = torch.tensor([3, -100, 0, 3, -100, 7, 0, -1])


def run(order: RowOrder, *, learned: Ignored | None = None) -> list[list[int]]:
    found: list[list[int]] = []
    while (rows := order.next()) is not None:
        found.append(torch.arange(100)[rows].tolist())
        order.learn(learned)
    return found


def test_as_they_come() -> None:
    assert run(RowOrder([], 7, 3, None)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert run(RowOrder([torch.zeros(4)], 4, 9, None)) == [[0, 1, 2, 3]]
    assert run(RowOrder([], 0, 3, None)) == [[]]


def test_negative_labels_wait() -> None:
    assert run(RowOrder([LABELS], 8, 3, None)) == [[0, 2, 3], [5, 6], [1, 4, 7]]


@pytest.mark.parametrize(
    ("label", "chunks"),
    [
        (-100, [[0, 2, 3], [5, 6], [7]]),
        (-1, [[0, 2, 3], [5, 6], [1, 4]]),
        (3, [[0, 2, 3], [5, 6], [1, 4, 7]]),  # those of the first chunk had been run
        (0, [[0, 2, 3], [5], [1, 4, 7]]),
    ],
)
def test_learned_from_the_first_chunk(label: int, chunks: list[list[int]]) -> None:
    assert run(RowOrder([LABELS], 8, 3, None), learned=(0, label)) == chunks


def test_learned_without_negative_labels() -> None:
    labels = torch.tensor([1, 2, 0, 0, 1, 0])
    assert run(RowOrder([labels], 6, 2, None), learned=(0, 0)) == [[0, 1], [4]]


def test_known_before() -> None:
    assert run(RowOrder([LABELS], 8, 3, (0, 0))) == [[0, 1, 3], [4, 5, 7]]
    assert run(RowOrder([torch.full((4,), -100)], 4, 3, (0, -100))) == [[]]
    assert run(RowOrder([torch.full((4,), 200, dtype=torch.uint8)], 4, 4, (0, -100))) == [[0, 1, 2, 3]]


def test_fake_labels_have_no_values() -> None:
    with FakeTensorMode():
        order = RowOrder([torch.zeros(5, dtype=torch.long)], 5, 3, (0, 0))
        assert [order.next(), order.next(), order.next()] == [slice(0, 3), slice(3, 5), None]


def loss(ignored: tuple[Tensor, int] | None) -> Loss:
    return Loss(torch.zeros(()), 1, is_mean=False, ignored=ignored)


def test_which_label_a_loss_ignored() -> None:
    labels, others = torch.arange(6), torch.arange(6)
    assert ignored_by([loss((labels, -100))], [torch.zeros(6), labels]) == (1, -100)
    assert ignored_by([loss((labels.view(2, 3), -1))], [labels]) == (0, -1)
    assert ignored_by([loss((labels, -1)), loss(None)], [labels]) is None
    assert ignored_by([loss((labels, -1)), loss((labels, 0))], [labels]) is None
    assert ignored_by([loss((others, -1))], [labels]) is None
    assert ignored_by([loss((labels[1:], -1))], [labels]) is None
    assert ignored_by([loss((labels, -1)) * 2], [labels]) is None
