"""One window over several processes: what they agree on before, and what becomes of their sums after.

With process r's sum  G_r = sum_b w_b grad l_b / E_r  over its own micro-batches (see `losses/normaliser`), the gradient
wanted is

    g = sum_r  (E_r / W) G_r         with  W = sum_r sum_b w_b

so each process multiplies its sum by its own factor, and the sums are added up. Where FSDP2 adds them up micro-batch
by micro-batch, E has to be the same on all processes and known before: it is agreed on when the window is opened.

At a window's end the processes exchange one `Message`: how it went, counts of samples and micro-batches, which
parameters were used, and each term's sum and weight (if these lie on a device they are added up there, in float64).
A process that has failed or has nothing to do takes part too, or the others would wait for ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.errors import RankError, UnsupportedError
from gradaccum.losses.loss import Weight
from gradaccum.losses.normaliser import Normaliser, Number
from gradaccum.norms import combined, norms
from gradaccum.sync import faults, flat
from gradaccum.sync.detect import detect
from gradaccum.sync.engine import Engine
from gradaccum.sync.messages import Caller, Kind, Message, Outcome
from gradaccum.sync.ranks import Ranks
from gradaccum.window.half_updates import HalfUpdates
from gradaccum.window.options import Options
from gradaccum.window.shares import Share, added_shares, roots_of, term_of
from gradaccum.window.stopping import Stopped
from gradaccum.window.window_result import WindowResult


def over_ranks(
    models: Sequence[nn.Module],
    options: Options,
    named: Sequence[tuple[str, nn.Parameter]],
    caller: Caller,
) -> OverRanks | None:
    """What trains together with this process; None where nothing does."""
    found = detect(models, options.sync, options.timeout, options.process_group)
    if found is None:
        return None
    exchanges = any(isinstance(module, nn.SyncBatchNorm) for model in models for module in model.modules())
    return OverRanks(*found, named, caller, has_users_collectives=options.collectives or exchanges)


class OverRanks:
    """A window's way over all processes, which have the same parameters in the same order.

    Attributes:
        caller: what the user has called, for messages; passes: over a loader, that were begun.
        pieces: micro-batches that every process runs in the open window, where that is agreed on.
        all_are_done: no process had a window of its own when messages were exchanged last.
        half_updates: what is known of the last update on all of them.
    """

    def __init__(
        self,
        ranks: Ranks,
        engines: Sequence[Engine],
        named: Sequence[tuple[str, nn.Parameter]],
        caller: Caller = Caller.ACCUMULATOR,
        *,
        has_users_collectives: bool = False,
    ) -> None:
        self.ranks = ranks
        self.caller = caller
        self.passes = 0
        self._engines = engines
        self.is_first = ranks.rank == 0  # the process that speaks for all
        self.is_wrapped = any(engine.is_wrapper for engine in engines)
        self._has_users_collectives = has_users_collectives
        self.runs_collectives = has_users_collectives or any(engine.runs_collectives for engine in engines)
        # In the seed of every backward, to undo an engine's averaging; None where none does.
        self.boost = next((engine.averages_over for engine in engines if engine.runs_collectives), None)
        self._reduces_shards = any(engine.runs_collectives for engine in engines)
        self.look_at(named)
        self._names: list[str] = []
        self._has_met = False
        self._update = 0
        self.half_updates = HalfUpdates()
        self._is_among_collectives = False  # others may be inside of a forward or backward, and read no message
        self.pieces = 0
        self.all_are_done = False

    def look_at(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Takes note of the parameters; called again whenever they have changed."""
        self._named = named
        self._is_sharded = {id(parameter) for _, parameter in named if hasattr(parameter, "device_mesh")}
        left_alone = {id(parameter) for engine in self._engines for parameter in engine.left_alone}
        self._own = [parameter for _, parameter in named if id(parameter) in left_alone]
        # Not added up here: what FSDP2 shards. Parts of tensor parallelism are, with the same parts of other processes.
        self._elsewhere = {*(self._is_sharded if self._reduces_shards else ()), *left_alone}
        self._model = zlib.crc32(repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named]).encode())

    @property
    def description(self) -> str:
        """What the plan line says: how many processes add up what, and when."""
        return f"{self.ranks.size} ranks, {self._engines[0].description}"

    @property
    def has_own(self) -> bool:
        """Whether some parameters are each process's own, with gradients of its own samples alone."""
        return bool(self._own)

    def total_norm(self, parameters: Sequence[nn.Parameter], order: float) -> Tensor:
        """The norm over the gradients of all processes: the own ones of each, and the common ones once.

        The order is 2; or infinity, where only that matters.
        """
        is_own = {id(parameter) for parameter in self._own}
        common = [p.grad for p in parameters if p.grad is not None and id(p) not in is_own]
        own = [p.grad for p in parameters if p.grad is not None and id(p) in is_own]
        total = combined(norms(own, order), order).to(self.ranks.device, torch.float64)
        total = total.square() if order == 2.0 else total
        self.ranks.add_up(total)
        total = total.sqrt() if order == 2.0 else total
        return combined([total, combined(norms(common, order), order).to(total)], order)

    @property
    def shards(self) -> bool:
        """Whether parameters lie in parts on the processes that train together."""
        return self._reduces_shards and bool(self._is_sharded)

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Context manager in which engines reduce gradients only when told to."""
        with ExitStack() as held:
            for engine in self._engines:
                held.enter_context(engine.taken_over())
            yield

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """Context manager that reports an error to the other processes before it goes on."""
        try:
            yield
        except BaseException as error:
            if self.runs_collectives and faults.is_of_transport(error):
                raise self.ranks.fault(error) from error
            self.tell(error)
            raise

    def tell(self, error: BaseException, *, is_between: bool = False) -> None:
        """Tells the other processes of an error here, if they are where they read messages.

        They are there ``is_between`` micro-batches, also where each forward waits for all.
        """
        if isinstance(error, (RankError, Stopped)):
            return
        if self.half_updates.is_stepping:
            self.half_updates.failed(self._update, f"rank {self.ranks.name}: {faults.description(error)}")
        faults.report(self.ranks.name, faults.description(error))
        # Not where everybody is being stopped.
        if (is_between or not self._is_among_collectives) and isinstance(error, Exception):
            with suppress(RankError):  # they have gone as well
                messages = self._agree(Kind.FAILURE, outcome=Outcome.FAILED, error=error)
                faults.withdraw()
                if all(message.outcome == Outcome.FAILED for message in messages):  # in the same way: none has stepped
                    self.half_updates.forget()
        self.half_updates.is_stepping = False

    @contextmanager
    def trained_with(self, caller: Caller | None = None) -> Iterator[None]:
        """Context manager for a whole window: `report_errors` around `taken_over`; for messages of this caller."""
        before = self.caller
        self.caller = before if caller is None else caller
        try:
            with self.report_errors(), self.taken_over():
                yield
        finally:
            self.caller = before

    def begin(
        self,
        totals: Mapping[str, Weight] | None,
        *,
        update: int,
        samples: int,
        pieces: int,
        last_total: float,
        is_done: bool,
    ) -> tuple[dict[str, Weight] | None, float | None]:
        """Agrees on what has to be known before a window's first backward.

        Args:
            totals: what this process's means are over, by term, where the user counts it ahead.
            update: index of the update that the window is for.
            samples: rows to come here, in so many pieces.
            pieces: see there.
            last_total: that of the window before.
            is_done: whether this process has no window of its own any more.

        Returns:
            The totals of all processes; and what an unknown total is taken for on all of them.
        """
        if self._own and totals is not None:
            raise UnsupportedError(
                "DistributedDataParallel was told to leave some parameters alone, whose gradients are those of each "
                "process's own samples, and weights= divides by what all processes have. Leave weights= out: the loss "
                "says what it is a mean over."
            )
        self._is_among_collectives = self.half_updates.is_stepping = False
        self.refuse_after_half_update()
        self._update = update
        self._meet()
        expected = None
        if self.runs_collectives or totals is not None:
            messages = self._agree(Kind.OPENING_A_WINDOW, is_done=is_done, micro_batches=pieces, samples=samples)
            if self.runs_collectives:
                self.all_are_done = all(message.is_done for message in messages)
                self.pieces = max(message.micro_batches for message in messages)
                # Any number will do that is the same on all processes: the gradient is corrected by expected / total
                # at the end. Close to the total it keeps half-precision gradients in range, so: what the window before
                # had, the rows of this one where they are known, or 1.
                expected = last_total or float(sum(message.samples for message in messages)) or 1.0
                self._is_among_collectives = True
        if totals is None:
            return None, expected
        return self._added_totals(totals), None

    def all_complete(self, is_complete: bool) -> bool:
        """Whether every process has only the micro-batch that is run next left in the open window."""
        return all(message.is_done for message in self._agree(Kind.RUNNING_A_MICRO_BATCH, is_done=is_complete))

    def prepare(self, *, is_last: bool) -> None:
        """Prepares a forward that waits for all processes; ``is_last`` where the window ends with it."""
        for engine in self._engines:
            engine.prepare(is_last=is_last)

    def backward_of_nothing(self, made: Any) -> None:
        """Runs the collectives of a backward, with gradients of zero, after a forward that is to change nothing.

        One backward for all models, so that it comes to them in the order in which those of the others do. Collectives
        of the user's own lie behind what the forward ``made``: the loss, or outputs.
        """
        roots = [output for engine in self._engines for output in engine.take_outputs()]
        if self._has_users_collectives:
            roots += roots_of(made)
        if roots:
            torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])

    def settle(
        self,
        normaliser: Normaliser,
        parameters: Sequence[nn.Parameter],
        *,
        sizes: Sequence[int | None],
        is_done: bool = False,
        wants_to_stop: bool = False,
    ) -> WindowResult:
        """Adds this process's window, of micro-batches of so many rows, and those of the others up.

        ``normaliser`` is about all processes afterwards, and ``.grad`` of the parameters has their sum. A process that
        is done has no more windows, and only takes part in those of the others. All hear that one wants to stop.

        Raises:
            RankError: another process failed or has gone, or is not closing this window.
            LossError: the loss is a sum on one process and a mean on another.
        """
        share = normaliser.share()
        reduced_here = [parameter for parameter in parameters if id(parameter) not in self._elsewhere]
        messages = self._exchange_shares(share, reduced_here, sizes, is_done=is_done, wants_to_stop=wants_to_stop)
        self._is_among_collectives = False
        self.all_are_done = all(message.is_done for message in messages)
        if self.all_are_done or not any(message.micro_batches for message in messages):
            normaliser.settle({})
            return WindowResult.over_ranks(messages, None)
        of_own = normaliser.correction  # by what this process has
        normaliser.settle(added_shares(self.ranks, self._names, messages, share, lone=self._named[0][1].dtype))
        if normaliser.is_empty:
            return WindowResult.over_ranks(messages, None)
        used = flat.merged_uses([message.uses for message in messages], len(reduced_here))
        # W is known now, and `correction` is E_r / W. Where no engine reduces in the backward, E_r differs from process
        # to process: the correction is multiplied in before the sum, and nothing is left to correct. Where one does, E
        # is the same everywhere, and most of the sum has been made already: the caller corrects all gradients alike.
        # Parameters that this engine does not shard were seeded with its boost too, but it has not averaged them, so
        # the boost is divided out here.
        if self.boost is None:
            flat.multiply(self._own, of_own)
            flat.reduce_gradients(self.ranks, reduced_here, used, factor=normaliser.correction)
            return WindowResult.over_ranks(messages, None)
        flat.reduce_gradients(self.ranks, reduced_here, used, factor=1.0 / self.boost)
        return WindowResult.over_ranks(messages, normaliser.correction)

    def stepped(self) -> None:
        """Makes sure that all processes have made the update that was settled last.

        Raises:
            RankError: the optimizer, the scheduler or ``before_step`` failed on another process.
        """
        try:
            self._agree(Kind.STEPPED)
        except RankError as error:
            self.half_updates.failed(self._update, self.ranks.reported or str(error))
            raise
        finally:
            self.half_updates.is_stepping = False

    def refuse_after_half_update(self) -> None:
        """Refuses to go on, and lets the others know, where an update was made on some processes only.

        Raises:
            RankError: it was.
        """
        error = self.half_updates.error
        if error is not None:
            with suppress(RankError):
                self._agree(Kind.FAILURE, outcome=Outcome.FAILED, error=error)
            raise error

    def rows_before(self, rows: int) -> tuple[int, list[int]]:
        """Where this process's rows are among those of all, and how many each process has.

        Raises:
            RankError: another process failed, or does not count anything now.
        """
        counts = [message.samples for message in self._agree(Kind.EXCHANGING_OUTPUTS, samples=rows)]
        return sum(counts[: self.ranks.rank]), counts

    def totals(self, own: Mapping[str, Number]) -> dict[str, Number]:
        """Each term's weight over all processes."""
        self._agree(Kind.EXCHANGING_OUTPUTS)
        return self._added_totals(own)

    def agree(self, is_out_of_memory: bool) -> bool:
        """Whether any process ran out of memory in its attempt at a window."""
        outcome = Outcome.OUT_OF_MEMORY if is_out_of_memory else Outcome.FINE
        messages = self._agree(Kind.LOOKING_FOR_A_SIZE, outcome=outcome)
        return any(message.outcome == Outcome.OUT_OF_MEMORY for message in messages)

    def share_findings(self, finding: Any) -> list[Any]:
        """What every process found in its look at a few rows, by rank."""
        self._meet()
        self._agree(Kind.LOOKING_AT_A_FEW_ROWS)
        return self.ranks.exchange_objects(finding)

    def _meet(self) -> None:
        if not self._has_met:
            self._agree(Kind.MEETING)
            whole = [parameter for _, parameter in self._named if id(parameter) not in self._elsewhere]
            self.ranks.check_same_model(self._model, [] if self._engines[0].runs_collectives else whole)
            self._has_met = True

    def _agree(
        self, kind: Kind, *, outcome: Outcome = Outcome.FINE, error: BaseException | None = None, **fields: Any
    ) -> list[Message]:
        message = Message(
            *(outcome, kind, self._update, 0 if kind == Kind.MEETING else self._model),
            caller=self.caller,
            sender=self.ranks.name,
            passes=self.passes,
            **fields,
        )
        layout = {"num_terms": len(self._names), "num_uses": len(self._named)} if kind == Kind.CLOSING_A_WINDOW else {}
        try:
            return self.ranks.agree(message, **layout, error=error)
        except RankError:  # all have heard of it: they may begin the same pass next
            self.passes = max(self.passes, self.ranks.furthest_pass)
            raise

    def _added_totals(self, own: Mapping[str, Weight]) -> dict[str, Any]:
        """Adds up numbers by name, of which each process may have others; waits for the device if they lie there."""
        mine = {name: total.item() if isinstance(total, Tensor) else total for name, total in own.items()}
        added: dict[str, Any] = {}
        for theirs in self.ranks.exchange_objects(mine):
            for name, total in theirs.items():
                added[name] = added.get(name, 0) + total
        return added

    def _exchange_shares(
        self, share: Share, reduced_here: Sequence[nn.Parameter], sizes: Sequence[int | None], **flags: Any
    ) -> list[Message]:
        known = [size for size in sizes if size is not None]
        messages = self._agree(
            Kind.CLOSING_A_WINDOW,
            micro_batches=len(sizes),
            samples=sum(known),
            largest=max(known, default=0),
            has_new_terms=any(name not in self._names for name in share),
            has_unknown_sizes=len(known) < len(sizes),
            terms=[term_of(share.get(name), self.ranks.device) for name in self._names],
            uses=flat.uses(reduced_here),
            **flags,
        )
        if not any(message.has_new_terms for message in messages):
            return messages
        # As in a run's first window. Names are added in the order of ranks, so the layout is the same on all processes.
        for names in self.ranks.exchange_objects(list(share)):
            self._names += [name for name in names if name not in self._names]
        return self._exchange_shares(share, reduced_here, sizes, **flags)
