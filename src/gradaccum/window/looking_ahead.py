"""One pass over a stream of micro-batches that knows, one item ahead, which is the last.

A generator would do for one accumulator. Two of them that share a stream (a GAN) cannot each look ahead by
themselves: the outer would draw the inner one on to the next micro-batch before its backward has run. So a pass is an
object that several can follow, and that is handed on where it is passed to another ``over()``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from gradaccum.errors import MisuseError
from gradaccum.window.read_ahead import ReadAhead

Item = TypeVar("Item")

END: Any = object()
"""What `LookingAhead.peek` gives where the stream has no such item."""

FAILED: Any = object()
"""The same where the stream raised instead of yielding it. The item before it is not the last, then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """What is called in a pass, by whoever counts its micro-batches.

    Attributes:
        pass_begins: before the first item, with the pass; what it returns is held until the pass ends.
        micro_batch_begins: before an item is handed out; gets it, whether it is the last, and the pass.
        micro_batch_ends: before the item after it is asked for, or the pass ends.
        pass_ends: at the end; gets whether all items have been handed out, or the loop was left before; and what had
            been read ahead and not handed out of a bare iterator, which cannot be asked for it again.
        pass_fails: gets the error of the stream or of a follower that ends the pass; of several the first is told.
        wants_again: whether the item before is to be handed out again instead of the next one; gets whether there is no
            next one, and whether there was one before. None for never.
        parameters: what is in training.
    """

    pass_begins: Callable[[LookingAhead[Any]], AbstractContextManager[None]]
    micro_batch_begins: Callable[[Any, bool, LookingAhead[Any]], None]
    micro_batch_ends: Callable[[], None]
    pass_ends: Callable[[bool, deque[Any]], None]
    pass_fails: Callable[[BaseException], None] = lambda error: None
    wants_again: Callable[[bool, bool], bool] | None = None
    parameters: Callable[[], Iterable[Tensor]] = tuple


class LookingAhead(Generic[Item]):
    """The items of a stream, for one ``for`` loop; a loop over a pass that has ended is a new pass.

    ``data_seconds`` is the time that reading the stream has taken so far.

    Nothing is asked for twice, and nothing further ahead than a follower looks. An error of the stream is raised in
    the place of the item that failed, after the ones before it have been handed out.
    """

    _iterator: Iterator[Item] | None = None  # also of one whose construction was interrupted

    def __init__(self, items: Iterable[Item], follower: Follower, *, ahead: deque[Item] | None = None) -> None:
        self._items = items
        self._followers = [follower]
        self._ahead: deque[Item] = deque() if ahead is None else ahead
        self._is_exhausted = False
        self.data_seconds = 0.0
        self._error: BaseException | None = None
        self._held = ExitStack()
        self._is_over = False
        self._repeats = follower.wants_again is not None
        self._before: Any = END
        self._current: Any = END  # read, and about to be handed out
        self._reading = ReadAhead(self._items)
        self._is_cut_short = self._is_nested = False

    def join(self, follower: Follower) -> None:
        """Has another one follow the same pass, before it begins."""
        self._followers.append(follower)
        self._repeats = self._repeats or follower.wants_again is not None

    @property
    def items(self) -> Iterable[Item]:
        """The stream."""
        return self._items

    @property
    def has_begun(self) -> bool:
        """Whether an item has been asked for."""
        return self._iterator is not None

    @property
    def is_over(self) -> bool:
        """Whether the pass has ended, completely or not."""
        return self._is_over

    @property
    def length(self) -> int | None:
        """How many items the stream has; None where it does not say."""
        try:
            return len(self)
        except (TypeError, NotImplementedError):
            return None

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __iter__(self) -> LookingAhead[Item]:
        if self._is_over:
            self._iterator, self._reading = None, ReadAhead(self._items)
            self._is_exhausted = self._is_over = self._is_cut_short = self._is_nested = False
            self._before = END
        elif self._iterator is not None:
            self._is_nested = True  # or a loop that was left goes on
        return self

    def __next__(self) -> Item:
        if self._is_over:
            self._refuse_rest()
            raise StopIteration
        try:
            item = self._advance()
        except StopIteration as error:  # of a follower (its weights= function, say): not the end of the stream
            self._end(completely=False)
            raise RuntimeError("a function called for a micro-batch raised StopIteration") from error
        except BaseException as error:
            self._followers[0].pass_fails(error)
            self._end(completely=False)
            raise
        if item is END:
            self._end(completely=True)
            raise StopIteration
        return item

    def _refuse_rest(self) -> None:
        """For a loop that asks on after its pass has ended in another one."""
        if self._is_cut_short:
            self._is_cut_short = False
            raise MisuseError(
                "A pass was ended by another over() of the same accumulator, inside of its loop: the rest of its "
                "micro-batches would be left out. One accumulator follows one pass at a time. End the outer loop "
                "first, or make an accumulator of its own for the inner one."
            )
        if self._is_nested:
            self._is_nested = False
            raise MisuseError(
                "A pass was iterated inside of a loop over itself, which took the rest of its micro-batches. A pass is "
                "for one loop at a time: call accumulator.over(loader) again after it, for a pass of its own."
            )

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for follower in self._followers for parameter in follower.parameters())

    def _advance(self) -> Item:
        """The next item, told to all followers, or END."""
        self._current = END
        if self._iterator is None:
            for follower in self._followers:
                self._held.enter_context(follower.pass_begins(self))
            self._iterator = iter(self._items)
        else:
            for follower in self._followers:
                follower.micro_batch_ends()
        if not self._ahead:
            self._fill(1)
        if self._repeats and self._error is None and self._is_wanted_again():
            for follower in self._followers:
                follower.micro_batch_begins(self._before, not self._ahead, self)
            return self._before
        if not self._ahead:
            return self._nothing_left()
        item = self._current = self._ahead.popleft()
        if not self._ahead:
            self._fill(1)
        is_last = not self._ahead and self._error is None
        if self._repeats:
            self._before = item
        for follower in self._followers:
            follower.micro_batch_begins(item, is_last, self)
        return item

    def _nothing_left(self) -> Any:
        error, self._error = self._error, None  # kept no longer than needed: its traceback holds these frames
        if error is None:
            return END
        try:
            raise error
        finally:
            del error

    def _is_wanted_again(self) -> bool:
        has_any = self._before is not END
        wanted = [follower.wants_again for follower in self._followers if follower.wants_again is not None]
        answers = [wants(not self._ahead, has_any) for wants in wanted]  # all of them are asked
        return any(answers)

    def peek(self, offset: int) -> Any:
        """The item ``offset`` places after the current one, or END where there is none."""
        if offset >= len(self._ahead):
            self._fill(offset + 1)
            if offset >= len(self._ahead):
                return END if self._error is None else FAILED
        return self._ahead[offset]

    def close(self) -> None:
        """Ends the pass where it stands; a loop that is left by ``break`` or an exception does so too."""
        self._end(completely=False)

    def cut_short(self) -> None:
        """Ends the pass for another one; a loop that would go on with it gets an error."""
        self._is_cut_short = True
        self._end(completely=False)

    def __del__(self) -> None:
        if self._iterator is not None:
            self.close()

    def _fill(self, count: int) -> None:
        assert self._iterator is not None, "the stream is opened with the first item"
        while len(self._ahead) < count and not self._is_exhausted:
            waiting = list(self._ahead) if self._current is END else [self._current, *self._ahead]
            since = time.perf_counter()
            try:
                self._ahead.append(self._reading.next(self._iterator, waiting, self._parameters))
            except StopIteration:
                self._is_exhausted = True
            except MisuseError:  # of reading ahead: the item at hand must not be used
                raise
            except Exception as error:  # noqa: BLE001 - raised again in its place
                self._is_exhausted, self._error = True, error
            finally:
                self.data_seconds += time.perf_counter() - since

    def _end(self, *, completely: bool) -> None:
        if self._is_over:
            return
        self._is_over = True
        unused = self._ahead if self._iterator is self._items else deque()
        self._iterator, self._ahead, self._error = iter(()), unused, None  # lets go of a loader's workers
        self._current = END
        with ExitStack() as ending:  # all of them are told, also where one raises
            for follower in self._followers:
                ending.callback(follower.pass_ends, completely, unused)
            ending.callback(self._held.close)
