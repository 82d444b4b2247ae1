"""Padding: trimmed in every field where it is certain, on its own side, and left alone where it is not."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradaccum.split.padding import find_padding, trimmed
from gradaccum.tree import named_leaves

LENGTHS = [5, 2, 7, 3, 5, 1]
WIDTH = 8  # one more than the longest
PIECE = [1, 3]  # whose longest has 3


def real(lengths: list[int], *, width: int = WIDTH, left: bool = False) -> Tensor:
    """[rows, width]: whether a column is real."""
    columns, ends = torch.arange(width), torch.tensor(lengths)[:, None]
    return columns >= width - ends if left else columns < ends


def everything(lengths: list[int] = LENGTHS, *, left: bool = False) -> dict[str, Tensor]:
    """A field of every kind that is padded, or as wide as those that are."""
    mask = real(lengths, left=left)
    rows = len(lengths)
    ids = torch.randint(5, 1_000, mask.shape)
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    square = mask[:, None, :] & causal
    return {
        "ids": torch.where(mask, ids, 0),
        "mask": mask.long(),
        "is_padding": ~mask,
        "labels": torch.where(mask & (torch.arange(WIDTH) > 1), ids, -100),
        "positions": torch.arange(WIDTH).repeat(rows, 1),
        "counted positions": (mask.cumsum(1) - 1).clamp(min=0),
        "marked positions": (mask.cumsum(1) - 1).masked_fill(~mask, 1),
        "types": torch.zeros(rows, WIDTH, dtype=torch.long),
        "features": torch.randn(rows, WIDTH, 3) * mask[..., None],
        "channels first": torch.randn(rows, 3, WIDTH) * mask[:, None],
        "square": square,
        "square of heads": square[:, None].repeat(1, 2, 1, 1),
        "bias": torch.zeros(square.shape).masked_fill(~square, -torch.inf)[:, None],
        "causal": causal.repeat(rows, 1, 1),
    }


def cut(batch: Any, costs: list[float], rows: list[int]) -> Any:
    return trimmed(batch, torch.tensor(rows), find_padding(batch, costs))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", everything())
def test_every_field_by_name(name: str, left: bool) -> None:
    batch = everything(left=left)
    piece = cut(batch, [float(length) for length in LENGTHS], PIECE)[name]
    expected = batch[name][PIECE]
    for dim in range(1, expected.dim()):
        if expected.shape[dim] == WIDTH:
            expected = expected.narrow(dim, WIDTH - 3 if left else 0, 3)
    assert torch.equal(piece, expected)
    assert piece.is_contiguous()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ["ids", "mask", "is_padding", "features", "channels first"])
def test_one_field_alone(name: str, left: bool) -> None:
    batch = everything(left=left)
    piece = cut((batch[name],), list(LENGTHS), PIECE)[0]
    assert 3 in piece.shape[1:]
    assert WIDTH not in piece.shape


@pytest.mark.parametrize("counted", ["both", "source"])
def test_source_and_target(counted: str) -> None:
    """Costs that are the sum of both trim both; those of the source tell nothing of the target."""
    source, target = [6, 3, 4, 2, 5, 3], [2, 4, 9, 3, 6, 5]
    tokens = torch.randint(5, 99, (6, 10)) * real(target, width=10)
    ids = torch.randint(5, 99, (6, 7)) * real(source, width=7)
    batch = {"source": ids, "target in": tokens[:, :-1], "target out": tokens[:, 1:]}
    both = [a + b - 1 for a, b in zip(source, target, strict=True)]
    piece = cut(batch, both if counted == "both" else source, PIECE)
    width = 4 if counted == "both" else 9
    assert [piece[name].shape[1] for name in batch] == [3, width, width]


@pytest.mark.parametrize("of", ["inputs", "targets"])
def test_targets_one_behind_inputs(of: str) -> None:
    tokens = torch.randint(5, 99, (6, 7)) * real(LENGTHS, width=7)
    x, y = tokens[:, :-1], tokens[:, 1:]
    costs = ((x if of == "inputs" else y) != 0).sum(1).tolist()
    piece = cut((x, y), costs, PIECE)
    assert piece[0].tolist() == x[PIECE, :3].tolist()
    assert piece[1].tolist() == y[PIECE, :3].tolist()


def test_a_constant_in_the_costs() -> None:
    batch = everything()
    batch["ids"][:, 0] = 1  # a start token that the costs do not count
    piece = cut(batch, [length - 1 for length in LENGTHS], PIECE)
    assert torch.equal(piece["ids"], batch["ids"][PIECE, :3])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_costs_in_the_order_of_the_lengths(left: bool) -> None:
    batch = everything(left=left)
    for costs in ([float(length**2) for length in LENGTHS], [0.01 * length for length in LENGTHS]):
        assert cut(batch, costs, PIECE)["ids"].shape == (2, 3)


def test_prompts_on_the_left_and_answers_on_the_right() -> None:
    mask = real([3, 1, 4, 2], width=4, left=True)
    mask = torch.cat([mask, real([1, 2, 5, 4], width=6)], dim=1)
    batch = {"ids": torch.randint(5, 99, mask.shape) * mask, "attention_mask": mask.long()}
    piece = cut(batch, mask.sum(1).tolist(), [0, 1])
    assert torch.equal(piece["ids"], batch["ids"][:2, 1:6])
    assert torch.equal(piece["attention_mask"], batch["attention_mask"][:2, 1:6])


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_a_mask_by_its_name_needs_no_other_proof(name: str) -> None:
    mask = real([3, 3, 3]).long()
    batch = {"ids": torch.randint(5, 99, (3, WIDTH)) * mask, name: mask}
    assert cut(batch, [8.0, 1.0, 4.0], [0])["ids"].shape == (1, 3)
    assert cut({"ids": batch["ids"], "other": mask}, [8.0, 1.0, 4.0], [0])["ids"].shape == (1, WIDTH)


def test_a_mask_that_is_added_is_a_field_like_any_other() -> None:
    added = torch.where(real(LENGTHS), 0.0, -torch.inf)
    assert torch.equal(cut({"attention_mask": added}, list(LENGTHS), PIECE)["attention_mask"], added[PIECE, :3])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_an_empty_sample(left: bool) -> None:
    lengths = [5, 0, 7, 0, 5, 1]
    batch = everything(lengths, left=left)
    assert cut(batch, list(lengths), [1, 5])["ids"].shape == (2, 1)
    assert cut(batch, list(lengths), [1, 3])["ids"].shape == (2, 1), "one column stays"


def test_a_piece_of_the_longest_and_rows_as_a_slice() -> None:
    batch = everything()
    assert cut(batch, list(LENGTHS), [2, 5])["ids"].shape == (2, 7)
    piece = trimmed(batch, slice(3, 6), find_padding(batch, list(LENGTHS)))
    assert torch.equal(piece["ids"], batch["ids"][3:6, :5])
    assert piece["ids"].is_contiguous()


def test_large_fields_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradaccum.split.padding.CHUNK", 1)
    batch = everything()
    assert cut(batch, list(LENGTHS), PIECE)["square"].shape == (2, 3, 3)


Pair = namedtuple("Pair", ["ids", "rest"])
Inputs = make_dataclass("Inputs", ["ids", "rest"])


@pytest.mark.parametrize(
    "nest",
    [
        pytest.param(lambda ids, rest: (ids, rest), id="tuple"),
        pytest.param(lambda ids, rest: [ids, {"rest": (rest, None)}], id="nested"),
        pytest.param(Pair, id="named tuple"),
        pytest.param(Inputs, id="dataclass"),
        pytest.param(lambda ids, rest: UserDict(ids=ids, rest=rest), id="mapping"),
        pytest.param(lambda ids, rest: {"ids": ids, "rest": rest, "texts": ["a"] * 6, "n": 3}, id="columns"),
        pytest.param(lambda ids, rest: {"ids": ids.numpy(), "rest": rest.numpy()}, id="arrays"),
    ],
)
def test_nestings(nest: Any) -> None:
    batch = everything()
    piece = cut(nest(batch["ids"], batch["features"]), list(LENGTHS), PIECE)
    assert type(piece) is type(nest(batch["ids"], batch["features"]))
    arrays = [leaf for _, leaf in named_leaves(piece, "piece") if isinstance(leaf, (Tensor, np.ndarray))]
    assert [tuple(array.shape) for array in arrays] == [(2, 3), (2, 3, 3)]


# -------------------------------------------------------------------------------------------------------- left as it is
def tokens(*shape: int) -> Tensor:
    return torch.randint(5, 99, shape)


def only(*names: str, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    return {name: field for name, field in everything(lengths).items() if name in names}


def repeated(count: int, value: float) -> Tensor:
    return torch.full((6, count), value)


def prompts(counts: Tensor) -> dict[str, Tensor]:
    ids = tokens(*counts.shape)
    return {"ids": ids, "labels": torch.where(counts, ids, -100)}


def changed(x: Tensor, at: tuple[int, ...], value: Any) -> Tensor:
    x[at] = value
    return x


def seen_from_both_sides(costs: list[int]) -> Tensor:
    mask = real(costs, width=16) & real(costs, width=16, left=True)
    return torch.randn(mask.shape) * mask


OTHER_COSTS = [3, 1, 4, 1, 5, 9]  # they have nothing to do with the lengths
ONE_LONGER = [length + 1 for length in LENGTHS]
WITH_LOSS = real([length - 1 for length in LENGTHS])

UNCERTAIN: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "all of one length, ending in the same tokens": lambda: (
        {"ids": torch.cat([tokens(6, WIDTH - 2), repeated(2, 2).long()], 1), "mask": torch.ones(6, WIDTH)},
        [WIDTH] * 6,
    ),
    "a start token without loss or cost in all": lambda: (
        {
            "ids": torch.cat([repeated(1, 1).long(), tokens(6, WIDTH - 1)], 1),
            "loss_mask": torch.cat([repeated(1, 0), repeated(WIDTH - 1, 1)], 1),
        },
        [WIDTH - 1] * 6,
    ),
    "prompts without labels; the costs are the labels": lambda: (prompts(real(LENGTHS, left=True)), LENGTHS),
    "other costs": lambda: (only("ids"), OTHER_COSTS),
    "other costs, and a mask": lambda: (only("ids", "mask"), OTHER_COSTS),
    "costs all alike": lambda: (only("ids", "mask"), [1.0] * 6),
    "one field is as wide and not padded": lambda: ({**everything(), "classes": torch.randn(6, WIDTH)}, LENGTHS),
    "one value past the lengths": lambda: (
        {**everything(), "features": changed(everything()["features"], (1, 5, 2), 1e-9)},
        LENGTHS,
    ),
    "an image as wide": lambda: ({**everything(), "image": torch.rand(6, 1, WIDTH, WIDTH)}, LENGTHS),
    "a full sample that is cheaper than others": lambda: (everything([5, 2, WIDTH, 3]), [5, 2, 4, 3]),
    "a sample that is all padding but not free": lambda: (only("ids", lengths=[5, 0, 7, 3]), [5, 4, 7, 3]),
    "one sample, in which every field is the same for all of them": lambda: (
        {"attention_mask": real([3]).long(), "ids": torch.arange(WIDTH)[None]},
        [3],
    ),
    "squares without a mask": lambda: (only("ids"), [float(length**2) for length in LENGTHS]),
    "an end token that is counted and looks like padding": lambda: (only("ids"), ONE_LONGER),
    "an end token that is counted, looks like padding and has no loss": lambda: (
        {"ids": tokens(*WITH_LOSS.shape) * WITH_LOSS, "loss_mask": WITH_LOSS},
        LENGTHS,
    ),
    "one length, without a mask of that name": lambda: (
        {name: field for name, field in everything([3] * 6).items() if "mask" not in name},
        [3] * 6,
    ),
    "lengths from the right and from the left": lambda: (
        {"features": seen_from_both_sides([9 + length for length in LENGTHS])},
        [9.0 + length for length in LENGTHS],
    ),
    "padded with NaN, which equals nothing": lambda: (
        {"features": torch.randn(6, WIDTH).masked_fill(~real(LENGTHS), torch.nan)},
        LENGTHS,
    ),
    "strings": lambda: ({**only("ids"), "words": np.array([["word"] * WIDTH] * 6)}, LENGTHS),
    "images with a border": lambda: (
        {"x": F.pad(torch.rand(6, 1, WIDTH - 4, WIDTH - 4), (2, 2, 2, 2)), "y": torch.arange(6)},
        OTHER_COSTS,
    ),
    "unpadded; the cheapest has runs of two and of one": lambda: (
        {"x": changed(torch.arange(6.0 * WIDTH).view(6, WIDTH), (0, 1), 0.0)},
        [WIDTH - 1, *[WIDTH] * 5],
    ),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_nothing_is_trimmed_without_certainty(name: str) -> None:
    batch, costs = UNCERTAIN[name]()
    assert find_padding(batch, costs).real == {}


@pytest.mark.parametrize(
    ("name", "doubt"),
    [
        ("one field is as wide and not padded", "(6, 8) is not constant where others are padded"),
        ("other costs", "costs do not go with the lengths that are seen along a dimension of 8"),
        ("strings", "not strided"),
    ],
)
def test_why_not(name: str, doubt: str) -> None:
    assert doubt in find_padding(*UNCERTAIN[name]()).doubt


def test_a_width_that_fails_does_not_keep_others() -> None:
    batch = {**everything(), "frames": torch.randn(6, 5, 2)}
    assert find_padding(batch, list(LENGTHS)).real.keys() == {WIDTH}


@st.composite
def batches_of_few_values(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[int], bool]:
    """Real columns that often look like padding: in each field two or three values, in pieces of any kind."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    lengths = draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    left = draw(st.booleans())
    mask = real(lengths, width=width, left=left)
    torch.manual_seed(draw(st.integers(0, 9_999)))
    batch = {
        str(i): torch.where(mask, torch.randint(0, draw(st.integers(1, 3)), mask.shape), draw(st.integers(0, 2)))
        for i in range(draw(st.integers(1, 3)))
    }
    return batch, lengths, left


@given(batches_of_few_values())
def test_no_real_column_is_cut_off_where_costs_count_them(made: tuple[dict[str, Tensor], list[int], bool]) -> None:
    batch, lengths, left = made
    width = batch["0"].shape[1]
    for starts, stops in find_padding(batch, lengths).real.values():
        for start, stop, length in zip(starts.tolist(), stops.tolist(), lengths, strict=True):
            assert (start <= width - length) if left else (stop >= length)  # the padded side


@given(st.lists(st.integers(0, WIDTH), min_size=2, max_size=8), st.booleans(), st.integers(0, 9_999))
def test_all_shared_padding_goes_and_nothing_else(lengths: list[int], left: bool, seed: int) -> None:
    torch.manual_seed(seed)
    batch = everything(lengths, left=left)
    padding = find_padding(batch, lengths)
    filled = {length for length in lengths if length}
    if len(filled) < 2 or min(lengths) > WIDTH - 2:  # nothing to tell padding by, or next to none of it
        assert padding.real == {}
        return
    starts, stops = padding.real[WIDTH]
    counts = torch.tensor(lengths)
    assert starts.tolist() == (WIDTH - counts if left else torch.zeros_like(counts)).tolist()
    assert stops.tolist() == (torch.full_like(counts, WIDTH) if left else counts).tolist()


# ------------------------------------------------------------------------------------------- a field and a part of it
def responses(*, masks: bool = True, shift: int = 0) -> tuple[dict[str, Tensor], list[int]]:
    """Prompts padded on the left, answers on the right, and the answers' columns once more."""
    prompts, answers = [3, 1, 4, 2], [1, 2, 4, 3]
    mask = torch.cat([real(prompts, width=4, left=True), real(answers, width=5)], dim=1).long()
    ids = torch.randint(5, 99, mask.shape) * mask
    batch = {"ids": ids, "attention_mask": mask, "responses": ids[:, 4 - shift :].clone()}
    if masks:
        batch["response_mask"] = mask[:, 4:].clone()
        batch["advantages"] = torch.randn(4, 5) * mask[:, 4:]
    return batch, [a + b for a, b in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("rows", [[0, 1], [2], [0, 3], [1]])
def test_the_last_columns_of_a_field_stay_the_last(rows: list[int]) -> None:
    batch, costs = responses()
    piece = cut(batch, costs, rows)
    width = piece["responses"].shape[1]
    assert piece["ids"].shape[1] < 9
    assert torch.equal(piece["ids"][:, -width:], piece["responses"])
    assert torch.equal(piece["attention_mask"][:, -width:], piece["response_mask"])
    assert piece["advantages"].shape == piece["responses"].shape


def test_a_part_that_cannot_be_trimmed_along_keeps_the_whole() -> None:
    batch, costs = responses()
    batch["scores"] = torch.randn(4, 5) + 10  # of every column of the answers, padded ones too
    piece = cut(batch, costs, [0, 1])
    assert piece["responses"].shape[1] == 5
    assert torch.equal(piece["ids"], batch["ids"][:2, 1:]), "on the left, where there is no part, it is trimmed"


def test_the_first_columns_of_a_field_stay_the_first() -> None:
    batch, costs = responses(masks=False)
    del batch["responses"]
    batch["prompts"] = batch["ids"][:, :4].clone()
    piece = cut(batch, costs, [0, 1])
    width = piece["prompts"].shape[1]
    assert torch.equal(piece["ids"][:, :width], piece["prompts"])
    assert width == 3


def test_a_field_that_is_padded_as_a_part_would_be() -> None:
    batch, costs = responses()
    del batch["responses"], batch["response_mask"]
    piece = cut(batch, costs, [0, 1])
    assert piece["ids"].shape[1] == 3 + 2
    assert piece["advantages"].shape[1] == 2
