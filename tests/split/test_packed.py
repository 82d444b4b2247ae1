"""Packed text is cut between its sequences, and never inside of one."""

from typing import Any

import pytest
import torch

import gradaccum as ga

LENGTHS = [3, 1, 4, 2, 5]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
T = len(POSITIONS)
CUMULATIVE = torch.tensor([0, 3, 4, 8, 10, 15], dtype=torch.int32)


def batch(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(T)[None], "position_ids": POSITIONS[None], **more}


@pytest.mark.parametrize("start", [0, 2])
def test_sequences_are_found_by_positions_that_start_anew(start: int) -> None:
    split, packed = ga.split_packed(), batch(position_ids=POSITIONS[None] + start)
    assert split.rows(packed) == split.largest(packed) == 5
    pieces = [split.cut(packed, rows)["input_ids"][0].tolist() for rows in split.plan(packed, 2)]
    assert pieces == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_what_goes_with_the_tokens_is_cut_with_them() -> None:
    packed = {
        "input_ids": torch.arange(T),
        "embeddings": torch.randn(1, T, T),
        "mask": torch.randn(1, 1, T, T),
        "cu_seq_lens_q": CUMULATIVE,
        "max_length_q": 5,
        "reward": torch.arange(5.0),
        "names": list("abcde"),
        "temperature": 0.7,
    }
    split = ga.split_packed()
    piece = split.cut(packed, torch.tensor([1, 3]))
    assert piece["input_ids"].tolist() == [3, 8, 9]
    assert piece["embeddings"].shape == (1, 3, T), "as many features as tokens are no tokens"
    assert torch.equal(piece["mask"][0, 0], packed["mask"][0, 0][[3, 8, 9]][:, [3, 8, 9]])
    assert (piece["cu_seq_lens_q"].tolist(), piece["cu_seq_lens_q"].dtype) == ([0, 1, 3], torch.int32)
    assert (piece["max_length_q"], piece["reward"].tolist(), piece["names"]) == (2, [1, 3], ["b", "d"])
    assert piece["temperature"] == 0.7
    assert split.cut(packed, slice(0, 5)) is packed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3), r"finds sequences by position_ids or cu_seq_lens, and the batch is a Tensor"),
        ({"input_ids": torch.zeros(1, 4)}, r"neither position_ids nor cu_seq_lens \('input_ids'\)"),
        ({"position_ids": torch.zeros(2, 4)}, r"shape \(2, 4\): several rows, which are samples already"),
    ],
    ids=["a tensor", "no positions", "rows"],
)
def test_batches_that_are_not_packed(wrong: Any, message: str) -> None:
    with pytest.raises(ga.BatchError, match=message):
        ga.split_packed().rows(wrong)


def test_what_goes_with_neither_tokens_nor_sequences() -> None:
    with pytest.raises(ga.BatchError, match=r"batch\['x'\] has shape \(7,\), of which no dimension has the 15 tokens"):
        ga.split_packed().cut(batch(x=torch.zeros(7)), slice(0, 2))


@pytest.mark.parametrize(
    "packed", [{"x": torch.zeros(T), "position_ids": POSITIONS}, {"x": torch.zeros(6), "cu_seqlens": CUMULATIVE}],
    ids=["positions", "cumulative lengths"],
)  # fmt: skip
def test_the_default_refuses_to_cut_inside_of_sequences(packed: Any) -> None:
    with pytest.raises(ga.BatchError, match=r"The batch is packed.*ga\.split_packed\(\)"):
        ga.split_by_samples().plan(packed, 2)
