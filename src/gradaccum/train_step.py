"""The whole batch in hand: cut, run piece by piece, updated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import DeviceMesh, ProcessGroup
from torch.optim import Optimizer

from gradaccum.batch_run import BatchRun
from gradaccum.errors import MisuseError, WindowError
from gradaccum.gradients.fused.choice import FusedOption
from gradaccum.gradients.given_backward import BackwardFunction
from gradaccum.losses.loss import Loss
from gradaccum.sync.detect import Sync
from gradaccum.sync.messages import Caller
from gradaccum.types import Activations, Randomness, Split, Update
from gradaccum.whole_batch.runners import BatchNorm, Combine, RunnerOptions
from gradaccum.window import guards
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.option_names import COUNTS, check_flag, check_function, explains_arguments
from gradaccum.window.options import Options
from gradaccum.window.parameters import as_sequence, refuse_closures
from gradaccum.window.progress import ProgressBar
from gradaccum.window.run_counts import HasCounts
from gradaccum.window.weights import WeightsFunction

if TYPE_CHECKING:
    from gradaccum.auditing.audit_report import Report


class TrainStep(HasCounts):
    """Trains with whole batches on the memory of one micro-batch.

    The update is the one the whole batch would have given:  g = sum_b w_b * grad l_b / sum_b w_b  over its
    micro-batches b, where l_b is a mean over w_b items.

    Args:
        model: one module or a sequence of them, on the device they train on.
        optimizer: one optimizer or a sequence of them, of the models' parameters.
        loss_fn: ``loss_fn(model, micro_batch)`` returns a `Loss`, a 0-d tensor (taken as the mean over the
            micro-batch's samples), or a dict of these. ``model`` is what was passed here; ``micro_batch`` has the
            batch's own structure, on the model's device.
        micro_batch_size: the largest number of samples one forward sees, at least 1; or "auto": the fastest that fits,
            found while training, smaller where memory runs out and larger again later. Out-of-memory costs time then,
            and changes nothing: the batch is run again in smaller pieces, from the same buffers. Each update draws its
            random numbers from a stream of its own, so that what follows does not depend on how it was cut; on which
            samples a dropout mask falls does: pass an int for runs that are to repeat.
        split: how a batch is cut, and what a sample is: `split_by_samples` by default, `split_by_cost`, `split_packed`,
            `split_as_given`, or a `Split` of your own.
        forward: with ``batch_loss``, in place of ``loss_fn``, for a loss that couples samples (contrastive, triplet,
            Dice over the batch): ``forward(model, micro_batch)`` returns the outputs, any nesting of tensors whose
            index 0 is the sample.
        batch_loss: ``batch_loss(outputs, batch)`` returns the loss of the whole batch, of whose size no micro-batch
            need be. ``outputs`` are detached from the model and in the batch's order, ``batch`` is on the model's
            device. An ``nn.Module`` may own parameters, a temperature say; they belong into the optimizer.
        combine: "sum" where outputs are statistics that add up over samples, of any shape: they are summed instead of
            concatenated, and take the memory of one.
        kept_graphs: of how many micro-batches the graph is kept from the forward that ``batch_loss`` needs to the
            backward; the others are run forward twice, with the same random numbers. None for as many as fit.
        batch_norm: what BatchNorm in training mode takes its statistics over: "micro", each micro-batch, which is not
            the whole batch's gradient and warns once; "exact", the whole batch, by running its micro-batches in
            lockstep; "frozen", the running statistics, which stay; ``ga.GhostBatch(n)``, groups of n consecutive
            samples. Running statistics advance once an update.
        lockstep: runs the micro-batches side by side, so that `gather` in the model's code sees the whole batch. Each
            then draws random numbers from a stream of its own, seeded from the CPU's.
        activations: where those of a micro-batch, in lockstep of the whole batch, wait for the backward: on the
            "device", on the "host", or not at all: "recompute" runs the model's repeated blocks again.
        weights: ``weights(batch)`` counts what the means of the loss are taken over: a number for one loss, a dict by
            name for several terms. It is called with the whole batch and with each micro-batch. Needed where several
            terms are means over different things.
        check: "first": before the first update that is cut, the step holds itself against the whole on at most 8 rows,
            which calls ``loss_fn`` a few times more and leaves no trace. A loss that does not add up is an error, a
            layer or a state that depends on the cut a warning with its name; the plan line says what was checked, or
            why nothing was. "off": nothing is checked.
        randomness: "sample" makes every draw in a forward (dropout, noise, masks, ``torch.rand`` and its kin) a
            function of the seed, the update, the number of the draw, the sample's place in the global batch and the
            element: the run is then the same for every micro-batch size, split, number of processes and resume. The
            seed is that of torch's CPU generator at the first update, and goes on in ``state_dict()``. ``loss_fn`` is
            called twice more before the first update. What cannot be keyed is named in one warning. "torch" draws anew
            for each micro-batch, as torch does.
        progress: a bar counted in updates, which also moves inside a batch; an int is the number of updates to come.

    All other options (``clip_norm``, ``scheduler``, ``scaler``, ``before_step``, ``fused``, ``accumulate_dtype``,
    ``persistent_gradients``, ``noise_scale``, ``backward``, ``sync``, ``timeout``, ``process_group``, ``collectives``)
    are those of `Accumulator`. Over processes each passes its own share of the batch, which may differ in size and have
    zero rows.

    Raises:
        ParameterError: optimizer and model do not belong together, or nothing is trainable.
        OptionError: an option that there is not, or of another type; ``split`` without `plan` and `cut`.
        WindowError: ``micro_batch_size`` is neither "auto" nor an int of at least 1, or smaller than a ghost batch; an
            option is none of its values.
        LossError: it is not said what the loss is, or said twice.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss_fn(model, micro_batch):
        ...     x, y = micro_batch
        ...     return F.mse_loss(model(x), y)
        >>> train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4)
        >>> update = train_step((torch.randn(13, 3), torch.randn(13, 1)))
        >>> update.index, update.samples, update.micro_batches, update.micro_batch_size
        (1, 13, 4, 4)
    """

    @explains_arguments("For micro-batches of so many samples write micro_batch_size={}.")
    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        loss_fn: Callable[[Any, Any], Any] | None = None,
        *,
        micro_batch_size: int | Literal["auto"] = "auto",
        split: Split | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        batch_loss: Callable[[Any, Any], Any] | None = None,
        combine: Combine = "concat",
        kept_graphs: int | None = None,
        batch_norm: BatchNorm = "micro",
        lockstep: bool = False,
        activations: Activations = "device",
        weights: WeightsFunction | None = None,
        check: Literal["first", "off"] = "first",
        clip_norm: float | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        before_step: Callable[[], Any] | None = None,
        fused: FusedOption = "auto",
        accumulate_dtype: torch.dtype | None = None,
        persistent_gradients: bool = False,
        noise_scale: bool = False,
        progress: bool | int = False,
        sync: Sync = "auto",
        backward: BackwardFunction | None = None,
        timeout: float | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        collectives: bool = False,
        randomness: Randomness = "torch",
    ) -> None:
        if micro_batch_size != "auto" and (type(micro_batch_size) is not int or micro_batch_size < 1):
            raise WindowError(
                f"micro_batch_size={micro_batch_size!r}: it is the number of samples that one forward sees, an int of "
                'at least 1, or "auto" for the fastest that fits. The gradient does not depend on it.'
            )
        self._max_rows = None if micro_batch_size == "auto" else micro_batch_size
        check_function("weights", weights, COUNTS)
        run_options = RunnerOptions(
            loss_fn=loss_fn,
            forward=forward,
            batch_loss=batch_loss,
            combine=combine,
            kept_graphs=kept_graphs,
            weights=weights,
            batch_norm=batch_norm,
            lockstep=lockstep,
            activations=activations,
        )
        self._split = run_options.split(split, max_rows=self._max_rows)
        if noise_scale is True:
            run_options.check_measures_noise(self._split)
        # What an audit makes another step of.
        adding = {"accumulate_dtype": accumulate_dtype, "fused": fused}
        self._configured: dict[str, Any] = {
            "model": model,
            "options": run_options,
            "split": split,
            "more_options": adding,
        }
        models = as_sequence(model, nn.Module, name="model")
        if isinstance(batch_loss, nn.Module) and batch_loss not in models:  # a temperature, say
            models.append(batch_loss)
        options = Options(
            clip_norm=clip_norm,
            scheduler=scheduler,
            scaler=scaler,
            before_step=before_step,
            fused=fused,
            accumulate_dtype=accumulate_dtype,
            persistent_gradients=persistent_gradients,
            noise_scale=noise_scale,
            sync=sync,
            backward=backward,
            timeout=timeout,
            process_group=process_group,
            collectives=collectives,
        )
        couples = batch_norm == "micro"
        self._accumulation = Accumulation(
            models, optimizer, options, couples_batch_norms=couples, caller=Caller.TRAIN_STEP
        )
        self._counts = self._accumulation.counts
        self._run = BatchRun(
            self._accumulation,
            model,
            models,
            run_options,
            split=self._split,
            max_rows=self._max_rows,
            check=check,
            randomness=randomness,
        )
        if type(progress) is not int:
            check_flag("progress", progress)
        total = progress if not isinstance(progress, bool) else None
        is_shown = self._accumulation.ranks is None or self._accumulation.ranks.is_first
        self._bar = ProgressBar(total=total) if progress is not False and is_shown else None
        self._run.inside = None if self._bar is None else self._bar.inside

    def __call__(self, batch: Any, *more: Any) -> Update:
        """One update from one whole batch.

        Args:
            batch: tensors in any nesting, index 0 the sample unless ``split`` says otherwise, on the host or on the
                device.
            *more: refused: a batch is one argument, ``train_step((x, y))``.

        Returns:
            The update, also where it was skipped because its gradient was not finite.

        Raises:
            BatchError: rows disagree, or there are none.
            LossError: the loss is not a scalar, has no graph, or cannot be normalised.
            MisuseError: a gradient is left over from something else; a batch in several arguments; or the step runs
                another batch.
        """
        if more:
            raise MisuseError(_in_one(batch, *more))
        refuse_closures(self._accumulation.optimizers)
        self._refuse_nested()
        self._accumulation.clock.called()
        self._accumulation.leave_if_agreed()
        with self._accumulation.with_others():
            try:
                self._run.run(batch, is_for_user=False)
                update = self._accumulation.close()
            except BaseException:
                if self._accumulation.is_open:  # Ctrl-C between the two
                    self._accumulation.discard()
                raise
        if self._bar is not None:
            self._bar.updated(update)
        return update

    def backward(self, batch: Any, *more: Any, unscale: bool = True) -> Loss:
        """The whole batch's gradient, added to ``.grad`` as torch's own backward does; no update.

        For closures (L-BFGS), methods of two gradients (SAM), sums of several batches' losses and for looking at
        gradients. Clipping, ``before_step``, scheduler and progress are left out.

        Args:
            batch: see `__call__`.
            *more: see `__call__`.
            unscale: with ``scaler=``, whether the loss scale is divided out again. ``scaler.step(optimizer)`` knows of
                it, and takes the gradients as they are. False leaves them scaled, as torch's own backward of
                ``scaler.scale(loss)`` does: for a ``scaler.unscale_(optimizer)`` of your own.

        Raises:
            MisuseError: ``unscale=False`` without a scaler, or on top of gradients that are unscaled.

        Returns:
            The whole batch's loss, detached: the mean and what it was taken over; for several terms their sum.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> lbfgs = torch.optim.LBFGS(model.parameters())
            >>> def loss_fn(model, micro_batch):
            ...     return F.mse_loss(model(micro_batch[0]), micro_batch[1])
            >>> train_step = ga.TrainStep(model, lbfgs, loss_fn, micro_batch_size=4)
            >>> batch = torch.randn(13, 3), torch.randn(13, 1)
            >>> def closure():
            ...     lbfgs.zero_grad()
            ...     return train_step.backward(batch).value
            >>> bool(lbfgs.step(closure) > closure())
            True
        """
        if more:
            raise MisuseError(_in_one(batch, *more))
        self._refuse_nested()
        aside = self._accumulation.set_aside(unscales=unscale)
        try:
            with self._accumulation.with_others(caller=Caller.BACKWARD):
                self._run.run(batch, is_for_user=True)
                loss = self._accumulation.close_into_grad(aside, unscales=unscale)
        except BaseException:
            self._accumulation.discard()
            self._accumulation.put_back(aside)
            raise
        return loss

    def audit(self, batch: Any) -> Report:
        """Finds out whether this step makes the whole batch's update, and if not, why; see `gradaccum.audit`.

        A second step with the same functions and options runs on copies: model, buffers, gradients, random state and
        this step are left as they were. With ``micro_batch_size="auto"`` micro-batches are of the present size, or
        before the first update of half the batch.

        Args:
            batch: as it is trained with; it has to fit in memory in one piece.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> def loss_fn(model, micro_batch):
            ...     return F.mse_loss(model(micro_batch[0]), micro_batch[1])
            >>> train_step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=4, batch_norm="exact")
            >>> train_step.audit((torch.randn(13, 3), torch.randn(13, 1))).exact
            True
        """
        from gradaccum.auditing.audit_task import make_task  # training does not wait for it
        from gradaccum.auditing.make_audit import audit_task

        task = make_task(**self._configured, batch=batch, make_step=TrainStep)
        size = self._max_rows
        if self._run.fitting is not None:
            size = self._run.fitting.present_size(batch)
        return audit_task(task, size or -(-task.rows // 2))

    def state_dict(self) -> dict[str, Any]:
        """The counters, in samples and updates, and the micro-batch sizes that were found.

        Model, optimizer, scheduler and scaler have states of their own.
        """
        state: dict[str, Any] = dict(self._accumulation.state_dict())
        if self._run.fitting is not None:
            state["sizes"] = self._run.fitting.state_dict()
        if self._run.draws is not None:
            state["draws"] = self._run.draws.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting where ``state_dict()`` was taken, perhaps with another micro-batch size.

        Raises:
            StateError: it is no such state, or of another version.
        """
        self._accumulation.check_state(state)
        if self._run.fitting is not None and "sizes" in state:
            self._run.fitting.load_state_dict(state["sizes"])
        if self._run.draws is not None and "draws" in state:
            self._run.draws.load_state_dict(state["draws"])
        self._accumulation.load_state_dict(state)

    def close(self) -> None:
        """Ends the progress bar where it stands."""
        if self._bar is not None:
            self._bar.close()

    def _refuse_nested(self) -> None:
        if self._accumulation.is_open:
            raise guards.nested_step(self._accumulation.open_micro_batches)


def _in_one(*batch: Any) -> str:
    names = ", ".join("xyzuvw"[: len(batch)]) if len(batch) <= 6 else "x, y, ..."
    return (
        f"A batch is one argument, and there are {len(batch)}; all but the first would be left out. Pass them as a "
        f"tuple, train_step(({names})), which loss_fn(model, micro_batch) gets in pieces: {names} = micro_batch."
    )
