"""One window over several processes: what they agree on before, and what becomes of their sums after.

With process r's sum  G_r = sum_b w_b grad l_b / E_r  over its own micro-batches (see `losses/normaliser`), the gradient
wanted is

    g = sum_r  (E_r / W) G_r         with  W = sum_r sum_b w_b

so each process multiplies its sum by its own factor, and the sums are added up. Where FSDP2 adds them up micro-batch
by micro-batch, E has to be the same on all processes and known before: it is agreed on when the window is opened.

What is said at a window's end is one message of 64-bit integers: how it went, counts of samples and micro-batches,
which parameters were used, and each term's sum and weight (these over the device, in float64, where they lie there).
Every process says equally much, also one that has failed or has nothing to do, or the others would wait for ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradaccum.errors import LossError, RankError
from gradaccum.losses.loss import Weight
from gradaccum.losses.normaliser import Normaliser, Number, host_number
from gradaccum.sync import faults, flat
from gradaccum.sync.detect import Sync, detect
from gradaccum.sync.engine import Engine, PlainModule
from gradaccum.sync.ranks import FAILED, FINE, OUT_OF_MEMORY, Ranks, bits_of, number_of
from gradaccum.sync.same_model import meet_for_the_first_time
from gradaccum.window.window_result import WindowResult

_ABSENT, _ON_HOST, _ON_DEVICE, _PLAIN_SUM = 0, 1, 2, 3
"""What a process has of a term: nothing; a weight here or there; a sum that is not divided."""

_HEADER = 7
_PER_TERM = 3


def over_ranks(models: Sequence[nn.Module], sync: Sync, named: Sequence[tuple[str, nn.Parameter]]) -> OverRanks | None:
    """What trains together with this process; None where nothing does."""
    found = detect(models, sync)
    return None if found is None else OverRanks(found.ranks, found.engines, named)


class OverRanks:
    """A window's way over all processes.

    Args:
        ranks: the processes.
        engines: what wraps each model.
        named: every parameter of the models, the same on all processes.

    Attributes:
        boost: what every backward is seeded with besides, to undo an engine's averaging; None for nothing.
        runs_collectives: whether every forward waits for all processes.
        pieces: how many micro-batches every process runs in the open window, where it is agreed on.
        all_are_done: whether no process had a window of its own any more when they spoke last.
        reductions: how many reductions of gradients there were so far, apart from what FSDP2 does in a backward.
    """

    def __init__(self, ranks: Ranks, engines: Sequence[Engine], named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.ranks = ranks
        self._engines = engines
        self.runs_collectives = any(engine.runs_collectives for engine in engines)
        factors = {engine.averages_over for engine in engines if engine.runs_collectives}
        self.boost = factors.pop() if factors else None
        self.look_at(named)
        self._names: list[str] = []
        self._has_met = False
        self.pieces = 0
        self.all_are_done = False
        self.reductions = 0

    def look_at(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Takes note of the parameters; again where they have changed."""
        self._named = named
        self._is_sharded = {id(parameter) for _, parameter in named if _is_sharded(parameter)}
        self._reduced_here = [parameter for _, parameter in named if id(parameter) not in self._is_sharded]
        self._signature = zlib.crc32(repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named]).encode())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.ranks.rank == 0

    @property
    def in_words(self) -> str:
        """For the plan line."""
        engine = self._engines[0]
        return f"{self.ranks.size} ranks, {getattr(engine, 'in_words', f'{engine.name}, reduced once an update')}"

    @property
    def shards(self) -> bool:
        """Whether parameters lie in parts on several processes."""
        return bool(self._is_sharded)

    def total_norm(self, parameters: Sequence[nn.Parameter], order: float) -> Tensor:
        """The norm over all gradients together, of which each process has a part."""
        from gradaccum.sync.fsdp2 import total_norm

        return total_norm(parameters, order)

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """While held, engines reduce gradients only when told to."""
        with ExitStack() as held:
            for engine in self._engines:
                held.enter_context(engine.taken_over())
            yield

    @property
    def is_wrapped(self) -> bool:
        """Whether a model's own forward and backward would reduce, if they were left alone."""
        return any(not isinstance(engine, PlainModule) for engine in self._engines)

    @contextmanager
    def told(self) -> Iterator[None]:
        """While held, an error is told to the other processes before it goes on."""
        try:
            yield
        except BaseException as error:
            if self.runs_collectives and faults.is_of_transport(error):
                raise self.ranks.fault(error) from error
            self.failed(error)
            raise

    @contextmanager
    def trained_with(self) -> Iterator[None]:
        """Both: engines are taken over, and errors told."""
        with self.told(), self.taken_over():
            yield

    def begin(
        self, totals: Mapping[str, Weight] | None, *, samples: int, pieces: int, last_total: float, is_done: bool
    ) -> tuple[dict[str, Weight] | None, float | None]:
        """Agrees on what has to be known before a window's first backward.

        Args:
            totals: what this process's means are over, by term, where the user counts it ahead.
            samples: rows to come here.
            pieces: micro-batches to come here.
            last_total: the window's before.
            is_done: whether this process has no window of its own any more.

        Returns:
            The totals of all processes; and what an unknown total is taken for on all of them.
        """
        if not self._has_met:
            checked = [] if self._engines[0].runs_collectives else self._reduced_here
            meet_for_the_first_time(self.ranks, self._signature, checked)
            self._has_met = True
        expected = None
        if self.runs_collectives:
            said = self._exchange([FINE, self._signature, is_done, pieces, samples])
            self.all_are_done = all(row[2] for row in said)
            self.pieces = max(row[3] for row in said)
            expected = last_total or float(sum(row[4] for row in said)) or 1.0
        if totals is None:
            return None, expected
        own = {name: _read(total) for name, total in totals.items()}  # waits for the device, where they are on it
        added: dict[str, Weight] = {}
        for theirs in self.ranks.exchange_objects(own):
            for name, total in theirs.items():
                added[name] = added.get(name, 0) + total
        return added, None

    def all_complete(self, is_complete: bool) -> bool:
        """Whether every process has only the micro-batch that is run next left in the open window."""
        return all(row[2] for row in self._exchange([FINE, self._signature, is_complete]))

    def prepare(self, *, is_last: bool) -> None:
        """Before a forward that waits for all processes."""
        for engine in self._engines:
            prepare = getattr(engine, "prepare", None)
            if prepare is not None:
                prepare(is_last=is_last)

    def backward_of_nothing(self) -> None:
        """After a forward that is not to change anything: what the others wait for."""
        for engine in self._engines:
            backward = getattr(engine, "backward_of_nothing", None)
            if backward is not None:
                backward()

    def settle(
        self,
        normaliser: Normaliser,
        parameters: Sequence[nn.Parameter],
        *,
        sizes: Sequence[int | None],
        is_done: bool = False,
    ) -> WindowResult:
        """Tells the others about this process's window, and leaves what all of them had in ``normaliser``, ``.grad``.

        Args:
            normaliser: of the window; from now on about all processes.
            parameters: whose gradients are wanted.
            sizes: rows of each micro-batch here.
            is_done: this process has no more windows, and only takes part in those of the others.

        Raises:
            RankError: another process failed or has gone.
            LossError: the loss is a sum on one process and a mean on another.
        """
        share = normaliser.share()
        reduced_here = [parameter for parameter in parameters if id(parameter) not in self._is_sharded]
        said = self._exchange_shares(share, reduced_here, sizes, is_done=is_done)
        self.all_are_done = all(row[2] & 2 for row in said)
        if self.all_are_done or not any(row[3] for row in said):
            normaliser.settle({})
            return _counted(said, None)
        normaliser.settle(self._whole(said, share))
        used = flat.merged_uses([row[_HEADER + _PER_TERM * len(self._names) :] for row in said], len(reduced_here))
        if normaliser.is_empty:
            return _counted(said, None)
        # What FSDP2 has not added up by itself has been seeded for its averaging all the same.
        factor = normaliser.correction if self.boost is None else 1.0 / self.boost
        self.reductions += flat.reduce_gradients(self.ranks, reduced_here, used, factor=factor)
        return _counted(said, None if self.boost is None else normaliser.correction)

    def rows_before(self, rows: int) -> tuple[int, list[int]]:
        """Where this process's rows are among those of all, and how many each process has.

        Raises:
            RankError: another process failed.
        """
        said = self._exchange([FINE, self._signature, 0, rows])
        self._heed([row[0] for row in said], FINE)
        counts = [row[3] for row in said]
        return sum(counts[: self.ranks.rank]), counts

    def add_up(self, tensor: Tensor) -> None:
        """Adds a tensor up over all processes, in place."""
        self.ranks.add_up(tensor)

    def totals(self, own: dict[str, Number]) -> dict[str, Number]:
        """Each term's weight over all processes."""
        self.rows_before(0)  # a process that has failed says so here
        added: dict[str, Number] = {}
        for theirs in self.ranks.exchange_objects({name: _read(total) for name, total in own.items()}):
            for name, total in theirs.items():
                added[name] = added.get(name, 0) + total
        return added

    def agree(self, is_out_of_memory: bool) -> bool:
        """Whether any process ran out of memory in its attempt at a window.

        Raises:
            RankError: another process failed otherwise.
        """
        code = OUT_OF_MEMORY if is_out_of_memory else FINE
        return self._heed([row[0] for row in self._exchange([code])], code) == OUT_OF_MEMORY

    def failed(self, error: BaseException) -> None:
        """Lets the others know that this process has failed; returns when they know, or cannot be told."""
        if isinstance(error, RankError):
            return
        faults.tell(self.ranks.rank, faults.in_words(error))
        if self.runs_collectives or not isinstance(error, Exception):
            return  # the others are inside of a collective of the model, or everybody is being stopped
        try:
            self._heed([row[0] for row in self._exchange([FAILED])], FAILED, error)
        except RankError:
            return  # they have gone as well

    def _heed(self, codes: Sequence[int], code: int, error: BaseException | None = None) -> int:
        return self.ranks.heed(codes, code, error)

    def _exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Messages of one length, whatever they are about: a process that failed does not know where the others are."""
        length = _HEADER + _PER_TERM * len(self._names) + flat.num_numbers(len(self._named))
        return self.ranks.exchange([*numbers, *[0] * (length - len(numbers))])

    def _exchange_shares(
        self,
        share: Mapping[str, tuple[Tensor, Number | None]],
        reduced_here: Sequence[nn.Parameter],
        sizes: Sequence[int | None],
        *,
        is_done: bool,
    ) -> list[list[int]]:
        known = [size for size in sizes if size is not None]
        is_known = len(known) == len(sizes)
        unheard = any(name not in self._names for name in share)
        numbers = [FINE, self._signature, is_done, len(sizes), sum(known), max(known, default=0), not is_known]
        numbers[2] = (is_done << 1) | unheard
        for name in self._names:
            numbers += self._term(share.get(name))
        said = self._exchange([*map(int, numbers), *flat.uses(reduced_here)])
        self._heed([row[0] for row in said], FINE)
        if len({row[1] for row in said}) > 1:
            raise RankError(
                f"The processes close windows of different models ({len({row[1] for row in said})} kinds of parameters "
                "among them), so their gradients cannot be added up. Every process must train the same models, in the "
                "same order."
            )
        if not any(row[2] & 1 for row in said):
            return said
        for names in self.ranks.exchange_objects(list(share)):
            self._names += [name for name in names if name not in self._names]
        return self._exchange_shares(share, reduced_here, sizes, is_done=is_done)

    def _term(self, share: tuple[Tensor, Number | None] | None) -> list[int]:
        if share is None:
            return [_ABSENT, 0, 0]
        total, weight = share
        on_host = self._is_on_host
        bits = bits_of(total.item()) if on_host else 0
        if weight is None:
            return [_PLAIN_SUM, 0, bits]
        if on_host or not isinstance(weight, Tensor):
            return [_ON_HOST, bits_of(float(weight)), bits]
        return [_ON_DEVICE, 0, bits]

    @property
    def _is_on_host(self) -> bool:
        return self.ranks.device.type == "cpu"

    def _whole(
        self, said: Sequence[Sequence[int]], share: Mapping[str, tuple[Tensor, Number | None]]
    ) -> dict[str, tuple[Tensor, Number | None]]:
        """Each term's sum and weight over all processes."""
        on_device = None if self._is_on_host else self._added_on_device(share)
        # A process without samples reports what the others do.
        dtype = next((total.dtype for total, _ in share.values()), _at_least_single(self._named[0][1].dtype))
        found: dict[str, tuple[Tensor, Number | None]] = {}
        for i, name in enumerate(self._names):
            entries = [row[_HEADER + _PER_TERM * i : _HEADER + _PER_TERM * (i + 1)] for row in said]
            kinds = {kind for kind, _, _ in entries} - {_ABSENT}
            if not kinds:
                continue
            if _PLAIN_SUM in kinds and len(kinds) > 1:
                raise LossError(
                    "The loss is a sum without `over` on one process, and has a weight on another. The one is not to "
                    "be divided by anything, the other is; their gradients cannot be added up. Return the same kind "
                    "everywhere: ga.Loss.sum(total, over=n)."
                )
            weight: Number | None = sum(_whole_number(number_of(bits)) for _, bits, _ in entries)
            total = torch.tensor(sum(number_of(bits) for _, _, bits in entries), dtype=dtype)
            if on_device is not None:
                total = on_device[2 * i].to(dtype)
                weight = weight if _ON_DEVICE not in kinds else weight + on_device[2 * i + 1]
            found[name] = total, None if _PLAIN_SUM in kinds else weight
        return found

    def _added_on_device(self, share: Mapping[str, tuple[Tensor, Number | None]]) -> Tensor:
        """Sum and weight of each term, as far as they lie on devices, added up there."""
        device = self.ranks.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.zeros(2 * len(self._names), dtype=wide, device=device)
        for i, name in enumerate(self._names):
            total, weight = share.get(name, (None, None))
            if total is not None:
                mine[2 * i] = total.to(wide)
            if isinstance(weight, Tensor):
                mine[2 * i + 1] = weight.to(wide)
        self.ranks.add_up(mine)
        return mine


def _counted(said: Sequence[Sequence[int]], correction: Number | None) -> WindowResult:
    is_known = not any(row[6] for row in said)
    done = [bool(row[2] & 2) for row in said]
    return WindowResult(
        micro_batches=sum(row[3] for row in said),
        samples=sum(row[4] for row in said) if is_known else None,
        largest=max(row[5] for row in said) if is_known else None,
        correction=correction,
        is_over=all(done),
        is_incomplete=any(done),
    )


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "device_mesh")


def _read(weight: Weight) -> Weight:
    number = host_number(weight)
    return number.item() if isinstance(number, Tensor) else number


def _whole_number(number: float) -> float | int:
    """Counts were ints before they travelled."""
    return int(number) if number.is_integer() else number


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
