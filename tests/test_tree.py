"""Nested batches: every nesting keeps its structure, every row goes to one piece, and what has no rows is shared."""

import dataclasses
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradaccum as ga
from gradaccum import tree
from gradaccum.tree.parts import Entries

ROWS = 5


class Named(NamedTuple):
    x: Any
    y: Any


Untyped = namedtuple("Untyped", ["x", "y"])


Data = dataclasses.make_dataclass("Data", ["x", "y"])
Frozen = dataclasses.make_dataclass("Frozen", ["x", "y"], frozen=True)
Slots = dataclasses.make_dataclass("Slots", ["x", "y"], slots=True)
FrozenSlots = dataclasses.make_dataclass("FrozenSlots", ["x", "y"], frozen=True, slots=True, kw_only=True)


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """A dataclass and a mapping, made like Hugging Face's ``ModelOutput``; what is None is no item."""

    x: Any = None
    y: Any = None
    z: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class ReadOnly(Mapping[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class ListOfOurs(list[Any]):
    pass


def by_default(x: Any, y: Any) -> defaultdict[str, Any]:
    made: defaultdict[str, Any] = defaultdict(list)
    made.update(x=x, y=y)
    return made


NESTINGS: dict[str, Callable[[Any, Any], Any]] = {
    "a tensor alone": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "a list of one's own": lambda x, y: ListOfOurs([x, y]),
    "named tuple": Named,
    "untyped named tuple": Untyped,
    "dict": lambda x, y: {"x": x, "y": y},
    "dict with keys of any kind": lambda x, y: {0: x, ("a", 1): y},
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "defaultdict": by_default,
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "ChainMap": lambda x, y: ChainMap({"x": x, "y": y}),
    "MappingProxyType": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "read-only mapping": lambda x, y: ReadOnly({"x": x, "y": y}),
    "dataclass": Data,
    "frozen dataclass": Frozen,
    "slots dataclass": Slots,
    "frozen slots dataclass": lambda x, y: FrozenSlots(x=x, y=y),
    "dataclass that is a mapping": lambda x, y: Output(x=x, y=y),
    "torch.return_types": lambda x, y: torch.return_types.max((x, y)),  # type: ignore[attr-defined]
    "nested": lambda x, y: {"a": [(x, {"deep": Data(y, None)})], "b": Named(x, [y])},
}
nestings = pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS.keys())


def example() -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * ROWS).reshape(ROWS, 2), torch.arange(ROWS)


@nestings
def test_every_nesting_keeps_its_structure(nest: Callable[[Any, Any], Any]) -> None:
    x, y = example()
    batch = nest(x, y)
    assert tree.rows(batch) == ROWS

    piece = tree.take(batch, slice(1, 4))
    assert type(piece) is type(batch)
    expected = list(tree.tensors(nest(x[1:4], y[1:4])))
    assert all(torch.equal(a, b) for a, b in zip(tree.tensors(piece), expected, strict=True))
    assert all(len(tensor) == ROWS for tensor in tree.tensors(batch)), "the batch itself is left as it was"

    moved = tree.to_device(batch, torch.device("cpu"))
    assert type(moved) is type(batch)
    assert all(a is b for a, b in zip(tree.tensors(moved), tree.tensors(batch), strict=True))


def test_to_another_device() -> None:
    moved = tree.to_device({"x": torch.zeros(2, 3), "name": "a"}, torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert moved["name"] == "a"


def test_a_defaultdict_keeps_its_factory() -> None:
    assert tree.take(by_default(*example()), slice(0, 2)).default_factory is list


def test_a_frozen_dataclass_is_copied_not_constructed() -> None:
    @dataclasses.dataclass(frozen=True)
    class WholeBatch:
        x: Tensor

        def __post_init__(self) -> None:
            assert len(self.x) == ROWS, "holds of whole batches only"

    assert len(tree.take(WholeBatch(example()[0]), slice(0, 2)).x) == 2


def test_a_dataclass_that_is_a_mapping_agrees_with_itself() -> None:
    x, y = example()
    piece = tree.take(Output(x=x, y=y), slice(0, 2))
    assert piece.x is piece["x"]
    assert list(piece) == ["x", "y"]
    assert piece.z is None


def test_a_class_of_dataclass_is_no_batch() -> None:
    assert tree.rows_or_none((Data, torch.zeros(3))) == 3


@pytest.mark.parametrize("which", ["BatchEncoding", "ModelOutput"])
def test_hugging_face(which: str) -> None:
    transformers = pytest.importorskip("transformers")
    x, y = torch.zeros(ROWS, 4, dtype=torch.long), torch.arange(ROWS)
    if which == "BatchEncoding":
        batch = transformers.BatchEncoding({"input_ids": x, "labels": y})
        piece = tree.take(batch, slice(1, 3))
        assert piece.input_ids.shape == (2, 4)
    else:
        from transformers.modeling_outputs import CausalLMOutput

        batch = CausalLMOutput(logits=x, hidden_states=(x, x))
        piece = tree.take(batch, slice(1, 3))
        assert [state.shape for state in piece.hidden_states] == [(2, 4)] * 2
        assert piece.loss is None
    assert tree.rows(batch) == ROWS
    assert type(piece) is type(batch)
    assert list(piece) == list(batch)


# ------------------------------------------------------------------------------------------- what has rows and what not
def test_index_tensors_take_rows_in_their_order() -> None:
    x, y = example()
    batch = {"x": x, "y": y, "names": list("abcde"), "pair": tuple("vwxyz"), "array": y.numpy()}
    index = torch.tensor([4, 0, 0])

    piece = tree.take(batch, index)

    assert piece["y"].tolist() == piece["array"].tolist() == [4, 0, 0]
    assert torch.equal(piece["x"], x[[4, 0, 0]])
    assert piece["names"] == ["e", "a", "a"]
    assert piece["pair"] == ("z", "v", "v")
    assert tree.take(batch, torch.tensor([], dtype=torch.long))["names"] == []


@pytest.mark.parametrize("column", [list("abcde"), tuple("abcde"), [b"a", b"b", b"c", b"d", b"e"], [1, 2, 3, 4, 5],
                                    [0.1, 0.2, 0.3, 0.4, 0.5], (1, 2, 3, 4, 5), range(5),
                                    [True, False, True, False, True],
                                    [np.float64(i) for i in range(ROWS)]], ids=repr)  # fmt: skip
def test_a_column_with_an_entry_for_each_row_is_cut(column: Any) -> None:
    piece = tree.take((torch.zeros(ROWS), column), slice(1, 3))
    assert piece[1] == column[1:3]
    assert type(piece[1]) is type(column)


@pytest.mark.parametrize("shared", [("a", "b"), ["a"], (3, 224, 224), torch.Size([5, 1]), "abcde",
                                    b"abcde", 7, 0.5, None, True, range(4), {"a"}, []], ids=repr)  # fmt: skip
def test_what_has_no_rows_is_shared_by_all(shared: Any) -> None:
    piece = tree.take({"x": torch.zeros(ROWS), "shared": shared}, slice(1, 3))["shared"]
    assert piece == shared
    assert type(piece) is type(shared)


def test_numpy_arrays_have_rows_and_tensors_without_dimensions_none() -> None:
    column, temperature = [np.int64(i) for i in range(ROWS)], torch.tensor(0.07)
    batch = {"x": np.arange(10).reshape(5, 2), "scalar": np.float64(3.0), "zero_d": np.array(2), "column": column}
    assert tree.rows(batch) == 5
    assert list(tree.tensors(batch)) == []
    piece = tree.take({**batch, "temperature": temperature}, slice(3, 5))
    assert piece["x"].tolist() == [[6, 7], [8, 9]]
    assert (piece["scalar"], piece["zero_d"], piece["column"]) == (3.0, 2, column[3:])
    assert piece["temperature"] is temperature


@pytest.mark.parametrize("lists", [[["a", "b"], ["c", "d"]], [[1, 2, 3], [4, 5]], [[], [None, ("a", 1)]]], ids=repr)
def test_a_list_of_lists_is_cut_by_rows_and_never_across(lists: list[list[Any]]) -> None:
    """Two captions for each of two images: the first image keeps both."""
    batch = {"x": torch.zeros(2), "lists": lists}
    assert [tree.take(batch, slice(i, i + 1))["lists"] for i in range(2)] == [lists[:1], lists[1:]]
    three = {"x": torch.zeros(3), "lists": lists}
    assert tree.take(three, slice(0, 1))["lists"] == lists, "not one for each row: shared"


@pytest.mark.parametrize("entries", [[{"id": 1}, {"id": 2}], [np.bool_(True), np.bool_(False)]], ids=repr)
def test_a_list_of_anything_without_tensors_is_a_column(entries: list[Any]) -> None:
    """Metadata of the samples: shared whole, zip(outputs, metadata) would give the second piece those of the first."""
    assert tree.take((torch.zeros(2), entries), slice(1, 2))[1] == entries[1:]


def test_slices_are_views_with_a_graph() -> None:
    x = torch.zeros(ROWS, 2, requires_grad=True)
    doubled = x * 2
    piece = tree.take({"x": doubled}, slice(0, 2))["x"]
    assert piece.data_ptr() == doubled.data_ptr()
    piece.sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [2, 2, 0, 0, 0]


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("batch", "one", "other"),
    [
        ((torch.zeros(4), torch.zeros(3, 2)), r"batch\[0\] has 4", r"batch\[1\] has 3 \(shape \(3, 2\)\)"),
        ({"x": torch.zeros(4), "y": [torch.zeros(5)]}, r"batch\['x'\] has 4", r"batch\['y'\]\[0\] has 5"),
        (Named(torch.zeros(2), torch.zeros(1)), r"batch\.x has 2", r"batch\.y has 1"),
        (Data(torch.zeros(2), {"z": torch.zeros(0)}), r"batch\.x has 2", r"batch\.y\['z'\] has 0"),
        ((torch.zeros(4), torch.tensor(1.0), torch.zeros(3)), r"batch\[0\] has 4", r"batch\[2\] has 3"),
        ([torch.zeros(4), np.zeros((2, 2))], r"batch\[0\] has 4", r"batch\[1\] has 2"),
    ],
)
def test_rows_that_disagree_name_both_leaves(batch: Any, one: str, other: str) -> None:
    with pytest.raises(ga.BatchError, match=f"Rows disagree: {one} and {other}"):
        tree.rows(batch)


@pytest.mark.parametrize(
    "batch", [(), {}, None, 3, "a", torch.tensor(1.0), (torch.tensor(1.0), None), Data(1, 2)], ids=repr
)
def test_nothing_with_rows(batch: Any) -> None:
    assert tree.rows_or_none(batch) is None
    with pytest.raises(ga.BatchError, match=rf"The batch \({type(batch).__name__}\) holds no tensor with a first dim"):
        tree.rows(batch)


def test_no_rows_at_all_is_a_count_too() -> None:
    assert tree.rows((torch.zeros(0, 2), torch.zeros(0))) == 0


# ----------------------------------------------------------------------------------------------------------- properties
def leaves_of(batch: Any) -> list[Any]:
    """What is in a batch, by hand: the slow and obvious way, for the nestings made below."""
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in leaves_of(value)]
    if isinstance(batch, Frozen):
        return leaves_of(batch.x) + leaves_of(batch.y)
    if isinstance(batch, (tuple, list)) and any(isinstance(value, Tensor) for value in batch):
        return [leaf for value in batch for leaf in leaves_of(value)]
    return [batch]


def nested(rows: int) -> st.SearchStrategy[Any]:
    """Batches of so many rows. Tuples and lists start with a tensor of another type than all others have, so that none
    is a column of strings, or as good a list of samples as of columns."""
    first = torch.arange(float(rows))
    leaf = st.sampled_from([torch.arange(rows), torch.arange(rows * 6).reshape(rows, 2, 3), torch.tensor(1.0), None, 3,
                            "text", [f"row {i}" for i in range(rows)], list(range(rows))])  # fmt: skip
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2).map(lambda many: (first, *many)),
            st.lists(inner, max_size=2).map(lambda many: [first, *many]),
            st.builds(Named, st.just(first), inner),
            st.builds(Frozen, inner, inner),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        ),
        max_leaves=8,
    ).map(lambda inside: (first, inside))


@given(st.data())
def test_all_pieces_together_are_the_batch_and_an_index_takes_what_it_takes_of_each_leaf(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 7))
    batch = data.draw(nested(rows))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    index = data.draw(st.lists(st.integers(0, rows - 1), max_size=4))

    pieces = [tree.take(batch, slice(start, stop)) for start, stop in pairwise(cuts)]
    chosen = tree.take(batch, torch.tensor(index, dtype=torch.long))

    assert tree.rows(batch) == rows
    assert [tree.rows(piece) for piece in pieces] == [b - a for a, b in pairwise(cuts)]
    for whole, few, *parts in zip(leaves_of(batch), leaves_of(chosen), *map(leaves_of, pieces), strict=True):
        if isinstance(whole, Tensor) and whole.dim():
            assert torch.equal(torch.cat(parts), whole)
            assert torch.equal(few, whole[index])
        elif isinstance(whole, list):
            assert [entry for part in parts for entry in part] == whole
            assert few == [whole[i] for i in index]
        else:
            assert all(part is whole for part in (few, *parts))


def test_map_leaves_calls_once_for_each_leaf() -> None:
    seen: list[Any] = []
    x, y = example()
    batch = {"x": x, "more": (y, None, "text", 3), "column": ["a", "b"]}
    mapped = tree.map_leaves(batch, lambda leaf: seen.append(leaf) or leaf)
    assert seen == [x, y, None, "text", 3, ["a", "b"]]
    assert mapped == batch


# --------------------------------------------------------------------------------------------- what could be two things
def images(count: int, rows: int = 3) -> list[Tensor]:
    return [torch.zeros(rows, 4, 4 + i % 2) for i in range(count)]


RAGGED = [torch.zeros(n, 4) for n in (3, 1, 2)]
READ: dict[str, tuple[Any, int, dict[tuple[Any, ...], Any]]] = {
    "a list of pictures and their labels": ((images(6), torch.zeros(6)), 6, {(0,): "entries", (1,): 0}),
    "columns in a list": ({"x": torch.zeros(5, 2), "hidden": images(2, 5)}, 5, {("x",): 0, ("hidden", 0): 0}),
    "ragged lists": ((RAGGED, [0, 1, 2]), 3, {(0,): "entries", (1,): "entries"}),
    "pictures and dicts": ((images(3), [{"b": torch.zeros(n, 4)} for n in (1, 2, 3)]), 3,
                           {(0,): "entries", (1,): "entries"}),
    "images of samples": ({"y": torch.zeros(4), "images": [images(2), [], images(1), []]}, 4, {("images",): "entries"}),
    "a list of pairs": ([(torch.zeros(3, 4), 1), (torch.zeros(3, 4), 2)], 2, {(): "entries"}),
    "a list of sequences": (RAGGED, 3, {(): "entries"}),
    "triplets in a tuple": ((torch.zeros(4, 2),) * 3, 4, {(2,): 0}),
    "three vectors in a list": ([torch.zeros(4, dtype=torch.int64)] * 3, 4, {(2,): 0}),
    "numbers in a tuple": ({"x": torch.zeros(4), "t": (1, 2, 3, 4), "u": (1, 2)}, 4,
                           {("t",): "entries", ("u",): None}),
    "0-d tensors": ({"x": torch.zeros(2), "t": [torch.tensor(1), torch.tensor(2)]}, 2, {("t",): "entries"}),
    "texts": (["a", "b", "c"], 3, {(): "entries"}),
    "columns of texts": ((["a", "b", "c"], [1, 2, 3]), 3, {(0,): "entries", (1,): "entries"}),
    "objects": (([object(), object()], torch.zeros(2)), 2, {(0,): "entries"}),
    "a share of no samples": (([], []), 0, {(0,): None}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_read_without_a_word(name: str) -> None:
    batch, rows, expected = READ[name]
    layout = tree.read(batch)
    assert layout.rows == tree.rows(batch) == rows
    for path, along in expected.items():
        found = layout.along[path]
        assert ("entries" if isinstance(found, Entries) else found) == along


X, W = torch.zeros(5), torch.zeros(3)
ASKED: dict[str, tuple[Any, str, tree.Axes]] = {
    "a list of three or more": (images(6), r"batch is a list of 6 tensors that have 3 rows.*axes=\{'': 0\}", {"": 0}),
    "as columns": (images(6), r"\{'': 1\} for columns", {"": 1}),
    "as many rows as entries": ({"y": W, "i": images(3)}, r"batch\['i'\] is a list.*axes=\{'i': 0\}", {"i": 0}),
    "neither": ({"y": X, "i": images(2)}, r"batch\['i'\]\[0\] has 3.*As a list of samples, batch\['i'\] has 2"
                r".*axes=\{'i': None\}", {"i": None}),
    "shared": ({"x": X, "w": W}, r"axes=\{'w': None\}", {"w": None}),
    "another dimension": ({"x": X, "w": torch.zeros(3, 5)}, r"\{'w': 1\} if they lie along dim", {"w": 1}),
    "nested": ({"x": X, "v": {"w": W}}, r"axes=\{'v.w': None\}", {"v.w": None}),
    "counted": ({"x": X[:2], "w": W}, r"\{'w': counts\}", {"w": lambda _: torch.tensor([1, 2])}),
    "counted in the batch": ({"patches": torch.zeros(8, 4), "x": X[:2], "grid": torch.tensor([[1, 2], [2, 3]])},
                             r"\{'patches': lambda batch: batch\['grid'\]\.prod\(1\)\}",
                             {"patches": lambda batch: batch["grid"].prod(1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_could_only_be_guessed_is_asked_and_the_answer_works(name: str) -> None:
    batch, message, axes = ASKED[name]
    with pytest.raises(ga.BatchError, match=message):
        tree.read(batch)
    layout = tree.read(batch, axes)
    rows = tree.rows_of(batch, layout)
    pieces = [tree.take(batch, slice(i, i + 1), layout) for i in range(rows)]
    assert len(pieces) == rows > 1


def test_a_count_needs_no_cut() -> None:
    assert tree.rows_or_none({"y": torch.zeros(3), "i": images(3)}) == 3, "3 either way"
    assert tree.rows_or_none([{"x": torch.zeros(5)}]) is None, "one sample, or what some loaders make of five"
    assert tree.rows_or_none([{"x": torch.zeros(5)}] * 2) == 2
    assert tree.rows_or_none(images(6)) is None


def test_what_an_earlier_batch_has_shown() -> None:
    split = ga.split_by_samples()
    settings = [0.1, 0.2, 0.3]
    split.plan({"x": torch.zeros(5), "s": settings, "i": images(5)}, 2)
    last = {"x": torch.zeros(3), "s": settings, "i": images(3)}
    piece = split.cut(last, split.plan(last, 2)[0])
    assert piece["s"] is settings, "it had another length than the first batch"
    assert len(piece["i"]) == 2, "samples in the first batch, so in this one"


def test_the_same_list_in_two_batches_is_a_setting(caplog: pytest.LogCaptureFixture) -> None:
    split = ga.split_by_samples()
    settings, first = [1, 2, 3, 4], {"x": torch.zeros(4), "s": [1, 2, 3, 4]}
    first["s"] = settings
    for _ in range(2):  # a batch that is passed twice is no other batch
        assert split.cut(first, split.plan(first, 2)[0])["s"] == [1, 2]
    second = {"x": torch.ones(4), "s": settings}
    assert split.cut(second, split.plan(second, 2)[0])["s"] is settings
    assert "batch['s'] is the same object in two batches" in caplog.text
    third = {"x": torch.ones(4), "s": [1, 2, 3, 4]}
    said = ga.split_by_samples(axes={"s": 0})
    assert said.cut(third, said.plan(third, 2)[1])["s"] == [3, 4]


def test_jagged_fields_of_one_offsets_still_go_together() -> None:
    ids = torch.nested.nested_tensor([torch.randn(n) for n in (2, 3, 1)], layout=torch.jagged)
    mask = torch.nested.nested_tensor_from_jagged(torch.randn(6), ids.offsets())
    piece = tree.take({"ids": ids, "mask": mask}, torch.tensor([2, 0]))
    assert [len(one) for one in (piece["ids"] + piece["mask"]).unbind()] == [1, 2]


def test_a_sparse_tensor_is_refused() -> None:
    batch = {"x": torch.eye(4).to_sparse(), "y": torch.zeros(4)}
    with pytest.raises(ga.BatchError, match=r"batch\['x'\] is a torch.sparse_coo tensor.*to_dense.*axes=\{'x': None\}"):
        tree.take(batch, slice(0, 2))
    assert tree.take(batch, slice(0, 2), axes={"x": None})["x"] is batch["x"]
