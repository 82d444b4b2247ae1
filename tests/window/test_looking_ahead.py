"""One pass: every item once and in order, the last one known to be, errors in their place, nothing kept alive."""

import gc
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.window.looking_ahead import END, FAILED, Follower, LookingAhead


class Recorder:
    """Follows a pass and writes down what it is told."""

    def __init__(self, log: list[Any] | None = None, *, name: str = "", peeks: int = 0) -> None:
        self.log: list[Any] = [] if log is None else log
        self.name = name
        self.peeks = peeks
        self.unused: list[Any] | None = None
        self.raises: dict[str, BaseException] = {}

    def follower(self) -> Follower:
        return Follower(
            pass_begins=self.begins, micro_batch_begins=self.item, micro_batch_ends=self.item_ends, pass_ends=self.ends
        )

    def begins(self, items: LookingAhead[Any]) -> AbstractContextManager[None]:
        self.note("begins")
        return self.held()

    @contextmanager
    def held(self) -> Iterator[None]:
        yield
        self.note("let go")

    def item(self, item: Any, is_last: bool, items: LookingAhead[Any]) -> None:
        ahead = [items.peek(offset) for offset in range(self.peeks)]
        self.note("item", item, *(["last"] if is_last else []), *ahead)

    def item_ends(self) -> None:
        self.note("item ends")

    def ends(self, completely: bool, unused: deque[Any]) -> None:
        self.unused = list(unused)
        self.note("complete" if completely else "left")

    def note(self, what: str, *more: Any) -> None:
        self.log.append((self.name + what, *more) if more else self.name + what)
        if what in self.raises:
            raise self.raises[what]


def over(items: Iterable[Any], **options: Any) -> tuple[LookingAhead[Any], Recorder]:
    recorder = Recorder(**options)
    return LookingAhead(items, recorder.follower()), recorder


class Stream:
    """A stream without a length that counts what it is asked for, and may fail."""

    def __init__(self, count: int, *, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.error = OSError("disk") if error is None else error
        self.opened = self.asked = 0
        self.closed = False

    def __iter__(self) -> Iterator[int]:
        self.opened += 1
        try:
            for i in range(self.count):
                self.asked += 1
                if i == self.fails_at:
                    raise self.error
                yield i
            self.asked += 1
        finally:
            self.closed = True


# --------------------------------------------------------------------------------------------------------- what is told
@pytest.mark.parametrize(
    ("stream", "peeks", "told"),
    [
        ("", 0, []),
        ("ab", 2, [("item", "a", "b", END), "item ends", ("item", "b", "last", END, END), "item ends"]),
        ([None, None], 0, [("item", None), "item ends", ("item", None, "last"), "item ends"]),
    ],
    ids=["nothing", "two", "of None"],
)
def test_the_order_of_things(stream: Iterable[Any], peeks: int, told: list[Any]) -> None:
    items, recorder = over(stream, peeks=peeks)
    assert list(items) == list(stream)
    assert recorder.log == ["begins", *told, "let go", "complete"]
    assert next(items, None) is None, "after the end there is nothing"
    assert recorder.log.count("complete") == 1


@given(st.integers(0, 6), st.integers(0, 4))
def test_every_item_once_and_the_last_is_known(count: int, peeks: int) -> None:
    stream = Stream(count)
    items, recorder = over(stream, peeks=peeks)
    assert list(items) == list(range(count))
    told = [entry for entry in recorder.log if entry[0] == "item"]
    assert [entry[1] for entry in told] == list(range(count))
    assert ["last" in entry for entry in told] == [i == count - 1 for i in range(count)]
    assert stream.opened == 1
    assert stream.asked == count + 1, "nothing is asked for twice, nor after the end"
    assert recorder.log[-1] == "complete"
    assert items.is_over


@given(st.integers(1, 6), st.integers(0, 3))
def test_no_further_ahead_than_asked_for(count: int, peeks: int) -> None:
    stream = Stream(count)
    items, _ = over(stream, peeks=peeks)
    for i in items:
        assert stream.asked == min(i + 1 + max(peeks, 1), count + 1)


def test_nothing_happens_before_the_first_item() -> None:
    stream = Stream(3)
    items, recorder = over(stream)
    assert iter(items) is items
    assert (items.has_begun, items.is_over, stream.opened, recorder.log) == (False, False, 0, [])
    next(items)
    assert (items.has_begun, items.is_over, stream.opened) == (True, False, 1)


def test_the_length_is_the_streams() -> None:
    assert len(over([1, 2, 3])[0]) == 3
    with pytest.raises(TypeError, match="has no len"):
        len(over(Stream(3))[0])
    assert list(over(Stream(3))[0]) == [0, 1, 2], "list() asks for a length, and does without"


# ------------------------------------------------------------------------------------------------ errors in their place
@pytest.mark.parametrize("fails_at", [0, 1, 3])
@pytest.mark.parametrize("peeks", [0, 3])
def test_an_error_of_the_stream_is_raised_where_its_item_would_be(fails_at: int, peeks: int) -> None:
    stream, seen = Stream(4, fails_at=fails_at), []
    items, recorder = over(stream, peeks=peeks)
    with pytest.raises(OSError, match="disk") as raised:
        seen.extend(items)
    assert raised.value is stream.error
    assert [entry[1] for entry in recorder.log if entry[0] == "item"] == list(range(fails_at))
    assert recorder.log[-2:] == ["let go", "left"]
    assert not any("last" in entry for entry in recorder.log), "the item before an error is not the last"
    assert stream.asked == fails_at + 1
    assert next(items, None) is None


def test_an_error_is_seen_ahead_as_such_and_not_raised_ahead_of_a_break() -> None:
    items, recorder = over(Stream(3, fails_at=1), peeks=2)
    assert next(items) == 0
    assert recorder.log[1] == ("item", 0, FAILED, FAILED)
    items.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["Ctrl-C", "exit"])
def test_an_interruption_does_not_wait_for_its_place(error: BaseException) -> None:
    items, recorder = over(Stream(3, fails_at=1, error=error))
    with pytest.raises(type(error)):
        next(items)
    assert recorder.log[-1] == "left"


@pytest.mark.parametrize("when", ["begins", "item", "item ends", "complete", "let go"])
def test_an_error_of_a_follower_ends_the_pass(when: str) -> None:
    stream = Stream(1)
    items, recorder = over(stream)
    recorder.raises[when] = ValueError(when)
    with pytest.raises(ValueError, match=when):
        list(items)
    assert items.is_over
    assert recorder.log[-1] in ("left", "complete"), "it is told of the end all the same"
    assert next(items, None) is None
    assert stream.closed or not stream.opened


def test_every_follower_is_told_of_the_end_also_if_one_raises() -> None:
    log: list[Any] = []
    first, second = Recorder(log, name="1 "), Recorder(log, name="2 ")
    second.raises["complete"] = ValueError("two")
    items = LookingAhead([0], first.follower())
    items.join(second.follower())
    with pytest.raises(ValueError, match="two"):
        list(items)
    assert {"1 let go", "2 let go", "1 complete", "2 complete"} <= set(log)


# ----------------------------------------------------------------------------------------------------------- left early
@pytest.mark.parametrize("how", ["break", "error", "close"])
def test_a_pass_that_is_left_is_closed_with_its_stream(how: str) -> None:
    stream = Stream(5)
    items, recorder = over(stream)
    with suppress(ValueError):
        for _ in items:
            if how == "error":
                raise ValueError("in the loop")
            break
    if how == "close":
        items.close()
        items.close()
        assert items.is_over
        assert next(items, None) is None
    del items
    gc.collect()  # the traceback of an error held it
    assert recorder.log[-2:] == ["let go", "left"]
    assert recorder.log.count("left") == 1
    assert stream.closed


def test_a_pass_that_never_began_ends_without_a_word() -> None:
    items, recorder = over(Stream(5))
    del items
    assert recorder.log == []


def test_what_was_read_ahead_of_a_bare_iterator_is_handed_back() -> None:
    """It cannot be asked for it again; a list or a loader can."""
    bare = iter(range(5))
    items, recorder = over(bare, peeks=2)
    assert next(items) == 0
    items.close()
    assert recorder.unused == [1, 2]
    assert list(bare) == [3, 4]

    items, recorder = over([0, 1, 2, 3])
    next(items)
    items.close()
    assert recorder.unused == []
    # What was handed back comes first.
    assert list(LookingAhead(iter([3, 4]), recorder.follower(), ahead=deque([1, 2]))) == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------- several followers
def test_those_who_join_see_the_same_pass() -> None:
    log: list[Any] = []
    items = LookingAhead([7], Recorder(log, name="1 ").follower())
    items.join(Recorder(log, name="2 ").follower())
    assert list(items) == [7]
    assert log[:4] == ["1 begins", "2 begins", ("1 item", 7, "last"), ("2 item", 7, "last")]
    assert log[4:8] == ["1 item ends", "2 item ends", "2 let go", "1 let go"], "what is held is let go in reverse"
    assert sorted(log[8:]) == ["1 complete", "2 complete"]


# --------------------------------------------------------------------------------------------------- nothing kept alive
class Item:
    pass


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is freed is freed by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pass_of_items(*, fails: bool = False) -> LookingAhead[Item]:
    def stream() -> Iterator[Item]:
        for _ in range(3):
            yield Item()
        if fails:
            raise OSError("disk")

    nothing = Follower(
        pass_begins=lambda items: nullcontext(),
        micro_batch_begins=lambda item, is_last, items: None,
        micro_batch_ends=lambda: None,
        pass_ends=lambda completely, unused: None,
    )
    return LookingAhead(stream(), nothing)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("kind", ["complete", "left", "failed"])
def test_a_pass_is_freed_by_itself(kind: str) -> None:
    items = pass_of_items(fails=kind == "failed")
    alive, last = weakref.ref(items), None
    with suppress(OSError):
        for item in items:
            last = weakref.ref(item)
            if kind == "left":
                break
    del items, item
    assert last is not None
    assert alive() is None
    assert last() is None


@pytest.mark.usefixtures("no_collection")
def test_items_are_freed_as_the_pass_goes_on() -> None:
    """Of a stream of micro-batches the pass holds those ahead, not those behind."""
    seen: list[weakref.ref[Item]] = []
    for item in pass_of_items():
        seen.append(weakref.ref(item))
        assert [ref() is not None for ref in seen[:-1]] == [False] * (len(seen) - 1)
