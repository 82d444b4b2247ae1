"""How an audit cuts: ragged, as a split says, or as the user's code can run it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradaccum as ga
import zoo
from gradaccum.auditing.audit_task import equal_cut, ways_to_cut
from gradaccum.types import Rows

ROUNDING = 1e-12
PATCHES = [0, 3, 8, 10, 17, 18]  # where each picture's patches begin


class ByPicture:
    """A split for a batch whose patches are of several pictures."""

    def rows(self, batch: Any) -> int:
        return len(batch["labels"])

    def largest(self, batch: Any) -> int:
        return self.rows(batch)

    def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
        return [torch.tensor([3, 0]), slice(1, 3), torch.tensor([4])]

    def cut(self, batch: Any, rows: Rows) -> Any:
        which = torch.arange(5)[rows].tolist()
        patches = [batch["patches"][PATCHES[i] : PATCHES[i + 1]] for i in which]
        return {"patches": torch.cat(patches), "labels": batch["labels"][rows]}


def pictures() -> dict[str, Tensor]:
    return {"patches": torch.randn(PATCHES[-1], zoo.FEATURES), "labels": torch.arange(5)}


def test_a_split_of_ones_own_cuts_and_counts() -> None:
    def patch_mean(model: Any, batch: Any) -> ga.Loss:
        return ga.Loss.mean(model(batch["patches"]).square().mean(), over=len(batch["patches"]))

    def picture_mean(model: Any, batch: Any) -> ga.Loss:
        return ga.Loss.mean(model(batch["patches"]).square().mean(), over=len(batch["labels"]))

    report = ga.audit(zoo.mlp(), patch_mean, pictures(), 2, split=ByPicture())
    assert report.exact, str(report)
    assert report.relative_error < ROUNDING
    assert (report.samples, report.micro_batch_sizes) == (5, (2, 2, 1))
    [culprit] = ga.audit(zoo.mlp(), picture_mean, pictures(), 2, split=ByPicture()).culprits
    assert culprit.kind == "loss-weight"


def test_samples_of_like_cost_whose_padding_is_trimmed() -> None:
    lengths = torch.tensor([9, 2, 7, 3, 3, 8, 1, 9, 4, 2, 6])
    ids = torch.randint(1, 9, (11, 9)).masked_fill(torch.arange(9) >= lengths[:, None], 0)
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.Dropout(0.3), nn.Linear(8, 9))
    criterion = ga.criterion(nn.CrossEntropyLoss(ignore_index=0))

    def told(model: Any, batch: Any) -> ga.Loss:
        return criterion(model(batch["ids"]).transpose(1, 2), batch["ids"])

    split = ga.split_by_cost(lambda batch: (batch["ids"] != 0).sum(1), 20)
    report = ga.audit(model, told, {"ids": ids}, 4, split=split)
    assert report.exact, str(report)  # dropout is the sample's own, also where the padding went
    assert report.relative_error < ROUNDING
    plain = ga.audit(model, lambda model, batch: told(model, batch).value, {"ids": ids}, 4, split=split)
    assert [culprit.kind for culprit in plain.culprits] == ["loss-weight"]


def test_one_piece_is_nothing_to_compare() -> None:
    class Uncut(ByPicture):
        def plan(self, batch: Any, size: int, *, max_rows: int | None = None) -> Sequence[Rows]:
            return [slice(0, 5)]

    with pytest.raises(ga.BatchError, match="leaves the batch of 5 samples in one piece"):
        ga.audit(zoo.mlp(), zoo.classes, pictures(), 2, split=Uncut())


def preferences(model: Any, x: Tensor) -> Tensor:
    rewards = model(x).view(-1, 2)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def test_pieces_that_the_users_code_cannot_run_are_said() -> None:
    report = ga.audit(nn.Linear(6, 1), preferences, torch.randn(16, 6), 6)
    assert report.exact
    assert report.micro_batch_sizes == (6, 6, 4)
    assert "pieces of 6, 5, 5 samples could not be run (shape '[-1, 2]' is invalid" in report.notes[0]


def test_no_pieces_that_run_are_an_error_with_what_was_tried() -> None:
    def only_whole(model: Any, x: Tensor) -> Tensor:
        if len(x) < 16:
            raise ValueError("sixteen, please")
        return model(x).square().mean()

    with pytest.raises(ga.BatchError, match=r"tried: 6, 5, 5; 6, 6, 4.*: sixteen, please"):
        ga.audit(nn.Linear(6, 1), only_whole, torch.randn(16, 6), 6)


def test_ways_to_cut() -> None:
    task = zoo.task(nn.Linear(6, 1), preferences, torch.randn(12, 6))
    ways = [[piece.rows for piece in cut] for cut in ways_to_cut(task, 4)]
    assert ways[0] == [4, 3, 3, 2]
    assert [piece.rows for piece in equal_cut(task, 4)] == [4, 4, 4]
    assert all(sum(cut) == 12 and len(cut) > 1 for cut in ways)
    assert [3, 3, 3, 3] in ways
