"""Batches in micro-batches that fit: out-of-memory is a transaction.

A backward that dies half-way has already added some gradients, and which ones nobody knows. So the window is started
again as if it never had been: gradients gone, random state and buffers as before its first micro-batch, the same
samples in smaller pieces. The optimizer has not been touched yet, so there is no update twice and none lost. The
rejected alternative, going on behind the pieces that had succeeded, needs a copy of all gradients just when there is no
memory.

What a failure costs is the micro-batches that had run; failures are rare, since a size that failed is remembered
(`size_search`). An attempt is repeated outside of the ``except`` block, with the error's frames cleared: a live
traceback keeps the tensors of the micro-batch that failed.

While the first batch is cut and tried there is no optimizer state yet, so a size may fit that fails at the second
update, with Adam by twice the parameters' bytes. What the state will take is counted with fake tensors, and kept
occupied meanwhile (`_state_reserved`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradaccum import tree
from gradaccum.errors import DoesNotFitError, MisuseError, WindowError
from gradaccum.fit.size_model import in_words
from gradaccum.fit.size_search import SizeSearch
from gradaccum.memory.live_bytes import num_bytes, tensors_in
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of
from gradaccum.split.asked import rows_in, smallest_pieces, unit_of
from gradaccum.split.by_samples import cuts_anywhere
from gradaccum.types import Rows, Split, num_rows
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.snapshot import ChangingBuffers, RandomSeed

logger = logging.getLogger("gradaccum")

RunPieces = Callable[[Sequence[Rows], Callable[[int], None]], None]
"""Runs pieces of a batch, telling when the window is open and after each piece how many have run."""


@dataclass(eq=False)
class Fitting:
    """Runs one batch after another in micro-batches of the fastest size that fits; of the largest without ``by_time``.

    Sizes are compared by time only where batches are cut by samples: another split has a budget that the user has
    chosen, which is kept unless memory runs out. ``advise`` says what else can help where a single sample does not fit.
    Where there are several processes, ``agree`` tells from whether this one ran out of memory whether any has.
    """

    split: Split
    accumulation: Accumulation
    by_time: bool = True
    advise: Callable[[Any], str] = lambda batch: ""
    agree: Callable[[bool], bool] = bool
    _has_told: bool = False
    _buffers: ChangingBuffers = field(default_factory=ChangingBuffers)

    @property
    def _cuts_by_samples(self) -> bool:
        return cuts_anywhere(self.split)

    @property
    def is_settled(self) -> bool:
        """Whether the size has been found."""
        return not self._search.wants_times

    def run(self, batch: Any, run_pieces: RunPieces) -> None:
        """Runs a batch whole, in as many attempts as it takes; ``run_pieces`` leaves no window open if it raises.

        Raises:
            DoesNotFitError: one sample alone ran out of memory.
        """
        random_seed = RandomSeed()
        try:
            with _state_reserved(self.accumulation.optimizers, self.accumulation.device()):
                sizes = self._run_until_it_fits(batch, run_pieces, random_seed)
            drew = random_seed.end()
            self._tell(sizes, drew=drew)
        except BaseException:
            self.accumulation.discard()
            random_seed.undo()
            raise

    def _run_until_it_fits(self, batch: Any, run_pieces: RunPieces, random_seed: RandomSeed) -> Sequence[int]:
        largest, elements = self._largest_and_elements(batch)
        buffers = self._buffers.copied(self.accumulation.models)
        versions = [(tensor, tensor._version) for tensor in tree.tensors(batch) if not tensor.is_inference()]
        while True:
            random_seed.begin()
            pieces, sizes = self._cut(batch, largest, elements)
            failed_at, failure = self._attempt(pieces, run_pieces, elements)
            self._buffers.seen(buffers)
            if not self.agree(failure is not None):
                if sizes:
                    self._search.updated(sizes, elements)
                return sizes
            if failure is None:  # another process did: it takes smaller pieces, this one the same again
                self.accumulation.discard()
                buffers.restore()
                _refuse_changed(versions)
                continue
            message = str(failure)
            let_go_of(failure)
            failed_rows = num_rows(pieces[failed_at])
            size = failed_rows if self._cuts_by_samples else max(sizes)
            failure = None
            self.accumulation.discard()
            free_memory(self.accumulation.device())
            buffers.restore()
            if not self._search.failed(size, elements) or not self._can_be_cut(batch, pieces[failed_at]):
                raise DoesNotFitError(self._diagnosis(batch, message, failed_rows))
            _refuse_changed(versions)
            logger.warning(
                "out of memory with a micro-batch of %s: the batch is run again in smaller ones, with the same "
                "gradient (%s)",
                f"{size} samples" if self._cuts_by_samples else f"at most {size} ({unit_of(self.split)})",
                message.splitlines()[0] if message else "no message",
            )

    def present_size(self, batch: Any) -> int | None:
        """The most rows of a micro-batch that this batch would be cut into now; None before the first batch."""
        if "_search" not in vars(self):
            return None
        pieces, _ = self._cut(batch, *self._largest_and_elements(batch))
        return max(map(num_rows, pieces), default=None)

    def _can_be_cut(self, batch: Any, piece: Rows) -> bool:
        """Whether there are smaller pieces than one that failed: a sample has none, nor has what stays together."""
        if num_rows(piece) == 1 or self._cuts_by_samples:
            return num_rows(piece) > 1
        rows = _numbers(piece)
        return rows not in map(_numbers, smallest_pieces(self.split, batch))

    def state_dict(self) -> dict[str, Any]:
        """The sizes found so far."""
        return self._search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the sizes another run has found."""
        self._search.load_state_dict(state)

    @functools.cached_property
    def _search(self) -> SizeSearch:  # begun at the first batch: whether a BatchNorm is in training mode may change
        by_time = self.by_time and self._cuts_by_samples and not self.accumulation.plan_line.coupled_layers()
        return SizeSearch() if by_time else SizeSearch.of_memory_only()

    def _largest_and_elements(self, batch: Any) -> tuple[int, int]:
        """How large a piece can be, and how many elements each of its rows has."""
        rows = rows_in(self.split, batch)
        if not rows and self.accumulation.ranks is not None:  # an empty share of a batch that other processes have
            return 0, 1
        largest = self.split.largest(batch)
        if not self._cuts_by_samples:
            return largest, 1
        self.split.plan(batch, largest)  # refuses what cannot be cut; sizes are the search's
        return largest, max(1, sum(tensor.numel() for tensor in tree.tensors(batch)) // rows)

    def _cut(self, batch: Any, largest: int, elements: int) -> tuple[Sequence[Rows], Sequence[int]]:
        """The pieces, and their sizes in the unit of the split."""
        if not largest:
            return [], []
        if not self._cuts_by_samples:
            size = self._search.size(largest, elements)
            return self.split.plan(batch, size), [size]
        sizes = self._search.sizes(largest, elements)
        return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))], sizes

    def _attempt(
        self, pieces: Sequence[Rows], run_pieces: RunPieces, elements: int
    ) -> tuple[int, BaseException | None]:
        """Runs the pieces; how many have run, and the error where memory ran out."""
        search, device = self._search, self.accumulation.device()
        done_before, since = 0, time.perf_counter()

        def ran(done: int) -> None:
            nonlocal done_before, since
            if not done:  # the window is open now
                since = time.perf_counter()
            elif search.wants_times:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # only while searching
                now = time.perf_counter()
                search.ran(num_rows(pieces[done - 1]), now - since, elements)
                since = now
            done_before = done

        try:
            run_pieces(pieces, ran)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            return done_before, error
        return done_before, None

    def _tell(self, sizes: Sequence[int], *, drew: bool) -> None:
        search, seconds = self._search, self._search.times.seconds()
        if self._has_told or not sizes or search.wants_times or not self._cuts_by_samples or not seconds:
            return
        self._has_told = True
        rates = ", ".join(f"{size}: {1 / seconds[size]:.3g}" for size in sorted(seconds) if seconds[size])
        text = (
            "micro-batch size %d is the fastest of those tried (samples a second: %s); to pin it: micro_batch_size=%d%s"
        )
        repeats = (
            ". Random numbers are drawn in the forward (dropout): which samples they fall on depends on the size, and "
            "the size on how busy the machine is. Pin it for runs that are to repeat"
        )
        logger.info(text, search.best_size(), rates, search.best_size(), repeats if drew else "")

    def _diagnosis(self, batch: Any, message: str, failed_rows: int) -> str:
        parameters = [parameter for model in self.accumulation.models for parameter in model.parameters()]
        gradients = [parameter for parameter in parameters if parameter.requires_grad]  # of the same size, when there
        states = tensors_in([dict(optimizer.state) for optimizer in self.accumulation.optimizers])
        held, trained, state = (in_words(num_bytes(tensors)) for tensors in (parameters, gradients, states))
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tree.tensors(batch))
        advice, what = self.advise(batch), "a single sample"
        if failed_rows > 1:
            what = f"{failed_rows} samples, which are one group or piece of the split and stay together,"
        return (
            f"A micro-batch of {what} runs out of memory, so smaller ones cannot help. The batch's tensors are of "
            f"shape {shapes}; parameters {held}, gradients {trained}, optimizer state {state}; the rest are "
            f"activations and temporaries. {advice}{' Otherwise' if advice else 'What can help'}: gradient "
            "checkpointing (activations), bf16 autocast (activations and temporaries), LoRA or freezing (gradients and "
            "optimizer state), offloading the optimizer state, shorter samples. No update was made, and gradients, "
            f"buffers and random state are as they were. The error was: {message}"
        )


def no_common_size() -> WindowError:
    """The error for a size that processes would each find for themselves, which share every forward."""
    return WindowError(
        'micro_batch_size="auto" with tensor parallelism: each process would find a size of its own, and wait in its '
        "forwards for micro-batches that the others do not run. Pass an int."
    )


def _numbers(rows: Rows) -> tuple[int, ...]:
    return tuple(range(rows.start, rows.stop)) if isinstance(rows, slice) else tuple(sorted(rows.tolist()))


def _refuse_changed(versions: Sequence[tuple[Tensor, int]]) -> None:
    """Refuses to run a batch again that is not any more what it was; micro-batches are views of it where they can be.

    Raises:
        MisuseError: a forward has written to one of its tensors.
    """
    changed = [tuple(tensor.shape) for tensor, version in versions if tensor._version != version]
    if changed:
        raise MisuseError(
            f"Memory ran out, and the batch cannot be run again in smaller micro-batches: the forward changes "
            f"{len(changed)} of its {len(versions)} tensors in place (shape {changed[0]}), and has done so for the "
            "micro-batches that ran already. What it does to its input, normalising it say, would be done twice. No "
            "update was made. Write x = x / 255 instead of x.div_(255), or x = x.clone() first; or pass a "
            "micro_batch_size that fits, with which nothing is run again."
        )


@contextmanager
def _state_reserved(optimizers: Sequence[Optimizer], device: torch.device) -> Iterator[None]:
    """Context manager that occupies the bytes of optimizer states to come, where running out of memory is an error."""
    new = [optimizer for optimizer in optimizers if not optimizer.state]
    held = None
    if new and _ends_in_an_error(device):
        from gradaccum.memory.optimizer_memory import optimizer_memory  # fake tensors take a while to import

        try:
            held = torch.empty(optimizer_memory(new).state, dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):  # where it is, there is no room at all: the update itself will say so
                raise
    try:
        yield
    finally:
        del held


def _ends_in_an_error(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
