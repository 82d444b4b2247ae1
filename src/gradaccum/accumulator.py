"""Your own loop: the loader yields micro-batches, the accumulator makes the updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import DeviceMesh, ProcessGroup
from torch.optim import Optimizer

from gradaccum.gradients.fused.choice import FusedOption
from gradaccum.gradients.given_backward import BackwardFunction
from gradaccum.sync.detect import Sync
from gradaccum.types import Update
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.option_names import COUNTS, check_function, explains_arguments
from gradaccum.window.options import Options
from gradaccum.window.own_loop import OwnLoop, Tail
from gradaccum.window.parameters import refuse_closures
from gradaccum.window.run_counts import HasCounts
from gradaccum.window.samples import SamplesFunction
from gradaccum.window.update_windows import UpdateWindow
from gradaccum.window.weights import WeightsFunction
from gradaccum.window.window_size import Schedule, WindowSize, check_tail

logger = logging.getLogger("gradaccum")

Item = TypeVar("Item")


class Accumulator(HasCounts):
    """Makes one exact update from several micro-batches of a loop that stays yours.

    Exactly one of ``batch_size`` and ``micro_batches`` says how long a window is; either may be a function of the
    update it is for (1, 2, ...), to change it while training.

    Args:
        model: one module or a sequence of them. Only their parameters get gradients.
        optimizer: one optimizer or a sequence of them, of the models' parameters.
        micro_batches: how many of the loader's micro-batches make an update.
        batch_size: how many samples make an update; the micro-batches must add up to it, but for the last ones.
        samples: ``samples(micro_batch)`` returns how many samples it has. Needed where they cannot be seen (lists of
            tensors, packed sequences, parts of unlike length) and ``batch_size`` or a plain loss counts them.
        tail: what becomes of an incomplete last window: applied with its true weight ("step"), thrown away ("drop"),
            or continued by the next pass ("carry").
        weights: ``weights(micro_batch)`` counts what the means of the loss are taken over: a number for one loss, a
            dict by name for several terms. Then ``over()`` reads a window ahead to know the totals, and holds it.
        clip_norm: largest 2-norm of the whole gradient, over all models; None to not clip.
        scheduler: a learning-rate scheduler or a sequence of them, advanced once for each update made.
        scaler: ``torch.amp.GradScaler`` for fp16, shared or not. `backward` takes the loss, not ``scaler.scale(loss)``.
        before_step: called without arguments once an update, right before the optimizer, when ``.grad`` holds the
            batch's own gradient, normalised, unscaled and clipped: for clipping by value, logging and changes. Step
            pre-hooks of the optimizer see the same.
        fused: whether weight gradients are added up in place, by one GEMM with beta = 1 and no temporary: "auto" where
            it pays, True wherever it is right, False nowhere. The sum is the same.
        accumulate_dtype: ``torch.float32`` adds the gradients of bf16 and fp16 parameters up in fp32, rounded once when
            the optimizer takes them; None in their own dtype, which loses 2% of them at 256 micro-batches.
        persistent_gradients: gradients keep their memory from window to window: for backwards that are replayed CUDA
            graphs (``torch.compile(mode="reduce-overhead")``), where torch is silently wrong without it.
        noise_scale: measures the gradient noise scale, for ``update.noise_scale`` and `advise`: one norm more an
            update, and ``update.grad_norm``. The first micro-batch has to be as good a sample of the data as the whole
            window: shuffle. Not with FSDP2 or tensor parallelism; None for terms with totals of their own.
        progress: a bar counted in updates for each pass, which also moves inside a window.
        sync: when gradients are added up over processes: "auto" for what costs no memory (once an update; in every
            backward for FSDP2), "last" for once an update, "every", or "never" to train for itself. ``batch_size``
            counts the samples of all processes, of which each passes an even share.
        backward: what runs each micro-batch's backward, where that is not torch's own: ``accelerator.backward``,
            ``fabric.backward``, a function. It is called ``backward(root, gradient=seed)``, once a micro-batch, and
            must end in ``root.backward(gradient=seed)``; several terms are joined to one root. What it divides or
            multiplies the root by on the way is undone, a loss scale too: that one belongs into ``scaler``. Gradients
            are not added up in place then.
        timeout: seconds that a message waits for another process; None for as long as the process group does.
        process_group: which processes have data of their own, where no wrapper says so; a group or a mesh of them.
        collectives: True where the model or the loss waits for all processes: all run equally many micro-batches.

    Raises:
        ParameterError: optimizer and model do not belong together, nothing is trainable, or an option is no option.
        WindowError: sizes below 1, both sizes or none, or an unknown tail.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader(
        ...     torch.utils.data.TensorDataset(torch.randn(23, 3), torch.randn(23, 1)), batch_size=5
        ... )
        >>> accumulator = ga.Accumulator(model, optimizer, batch_size=10)
        >>> for x, y in accumulator.over(loader):
        ...     update = accumulator.backward(F.mse_loss(model(x), y))
        ...     if update:
        ...         print(update.index, update.samples)
        1 10
        2 10
        3 3
    """

    @explains_arguments("Write batch_size={0}, a number of samples, or micro_batches={0}, of the loader's items.")
    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        micro_batches: Schedule | None = None,
        batch_size: Schedule | None = None,
        samples: SamplesFunction | None = None,
        tail: Tail = "step",
        weights: WeightsFunction | None = None,
        clip_norm: float | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        before_step: Callable[[], Any] | None = None,
        fused: FusedOption = "auto",
        accumulate_dtype: torch.dtype | None = None,
        persistent_gradients: bool = False,
        noise_scale: bool = False,
        progress: bool = False,
        sync: Sync = "auto",
        backward: BackwardFunction | None = None,
        timeout: float | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        collectives: bool = False,
    ) -> None:
        size = WindowSize(micro_batches, batch_size)
        check_function("weights", weights, COUNTS)
        check_tail(tail, has_weights=weights is not None)
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
        self._accumulation = Accumulation(model, optimizer, options, warns_of_unknown=True)
        refuse_closures(self._accumulation.optimizers)
        self._counts = self._accumulation.counts
        self._loop = OwnLoop(self._accumulation, size, samples=samples, tail=tail, weights=weights, progress=progress)

    def over(self, micro_batches: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches of one pass, as the loader yields them; knows one ahead which is the last.

        Leaving the loop early discards a half window, with a warning. A loop over a pass that has ended is a new pass
        over the same loader. One item is read ahead, so a loader must neither fill the memory of an item again with the
        next nor compute its items with the model: both are errors. To have two accumulators follow one pass, hand
        the pass of the one to the other: ``discriminator.over(generator.over(loader))``.

        Args:
            micro_batches: a ``DataLoader`` or any iterable, with a length or without.

        Raises:
            MisuseError: a window that was begun outside of a pass is still open. In the loop: the loader cannot be read
                ahead, or the pass was ended by another one.
            WindowError: with ``tail="drop"`` the pass is too short for a single window.
        """
        return self._loop.over(micro_batches)

    def windows(self, micro_batches: Iterable[Item]) -> Iterator[UpdateWindow[Item]]:
        """One pass, window by window, equally many on every process: for a loop with collectives of its own at updates.

        A window yields its micro-batches; then it has ``window.update``, also where the loader is exhausted.
        """
        return self._loop.windows(micro_batches)

    def backward(self, loss: Any, *, samples: int | None = None) -> Update | None:
        """Adds the micro-batch's share to the gradient; makes the update when the window is complete.

        Outside of a pass, ``samples`` says what a plain loss or ``batch_size`` needs to know, and an incomplete last
        window is closed by `flush`.

        Args:
            loss: `Loss`; or a 0-d tensor, the mean over the micro-batch's samples; or a dict of these by name.
            samples: how many samples the micro-batch has, outside of a pass; in one, `over` has counted them.

        Returns:
            None inside a window; the update when this was its last micro-batch.

        Raises:
            LossError: not a scalar, no graph, or a mean whose weight is unknown. The window is discarded.
            MisuseError: called twice for a micro-batch, or its gradients were changed by hand.
        """
        return self._loop.backward(loss, samples)

    def flush(self) -> Update | None:
        """Applies an incomplete window with its true weight: one that was carried, or begun outside of a pass.

        Returns:
            The update, or None where nothing had been added.
        """
        return self._loop.flush()

    def discard(self) -> int:
        """Throws the open window away: its micro-batches are in no update, and the next one starts a new window.

        Inside of a pass, a micro-batch that was handed out and had no backward yet is left out as well.

        Returns:
            How many micro-batches had been added to it; 0 where none was open.
        """
        return self._loop.discard()

    def state_dict(self) -> dict[str, Any]:
        """The counters, in samples and updates, and how large windows are.

        Model, optimizer, scheduler and scaler have states of their own.
        """
        return {**self._accumulation.state_dict(), "window": self._loop.window_size(self.updates + 1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting where ``state_dict()`` was taken, perhaps with windows of another size, which is logged.

        Raises:
            StateError: it is no such state, or of another version, or a window is open.
        """
        self._accumulation.load_state_dict(state)
        before, now = state.get("window"), self._loop.window_size(self.updates + 1)
        if before is not None and before != now:
            logger.info(
                "the state was saved with %s, and this run goes on with %s from update %d on",
                *(", ".join(f"{name}={size}" for name, size in one.items()) for one in (before, now)),
                self.updates + 1,
            )
