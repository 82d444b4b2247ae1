"""One window after another: what both ways of training share.

A window is opened with what is known of it ahead, gets its micro-batches' losses one by one, and is closed into an
update, or discarded. Who decides about its boundary, the user's loop or the batch in hand, is not known here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradaccum import guards
from gradaccum.errors import LossError
from gradaccum.gradients.dot_grad import DotGrad
from gradaccum.gradients.fused.choose import FusedOption, choice_of
from gradaccum.gradients.wide import checked_accumulate_dtype
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.meaning import SampleMeans
from gradaccum.losses.normalise import SINGLE, Normaliser, Seeds
from gradaccum.losses.terms import as_loss, as_terms
from gradaccum.runners.announcements import Announcements
from gradaccum.runners.counters import Counters
from gradaccum.types import Update
from gradaccum.update import Updater

logger = logging.getLogger("gradaccum")


class Accumulation:
    """Adds up the gradients of a window's micro-batches and makes the update from them.

    Args:
        model: one module or a sequence of them.
        optimizer: one optimizer or a sequence of them; their parameters must be the models'.
        clip_norm: see `Updater`.
        scheduler: one or a sequence of them, advanced once an update; None for none.
        scaler: see `Updater`.
        fused: see `choice_of`.
        accumulate_dtype: see `WideSums`.
        couples_batch_norms: whether BatchNorm in training mode sees single micro-batches.

    Attributes:
        counters: what went into updates so far.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        clip_norm: float | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        fused: FusedOption = "auto",
        accumulate_dtype: torch.dtype | None = None,
        couples_batch_norms: bool = True,
    ) -> None:
        self._fused = choice_of(fused)
        self._accumulate_dtype = checked_accumulate_dtype(accumulate_dtype)
        self.models: list[nn.Module] = guards.as_sequence(model, nn.Module, name="model")
        self.optimizers: list[Optimizer] = guards.as_sequence(optimizer, Optimizer, name="optimizer")
        guards.refuse_data_parallel(self.models)
        self._find_parameters()
        self._schedulers: list[Any] = (
            [] if scheduler is None else list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
        )
        self._updater = Updater(
            self.optimizers,
            clip_norm=clip_norm,
            schedulers=self._schedulers,
            scaler=scaler,
            narrow=None if accumulate_dtype is None else lambda: self._gradients.narrow(),
        )
        self._means = SampleMeans()
        self._normaliser: Normaliser | None = None
        self._seeds = Seeds()
        self._known_samples = 0
        self._last_total = 0.0
        self._announcements = Announcements(self.models, couples_batch_norms=couples_batch_norms)
        self._sizes: list[int | None] = []
        self.counters = Counters()

    @property
    def is_open(self) -> bool:
        """Whether a window has been opened and neither closed nor discarded."""
        return self._normaliser is not None

    @property
    def open_micro_batches(self) -> int:
        """Micro-batches added to the open window so far."""
        return len(self._sizes)

    @property
    def open_samples(self) -> int:
        """Rows added to the open window so far, as far as they could be seen."""
        return self._known_samples

    def has_coupled_layers(self) -> bool:
        """Whether the gradient depends on how a batch is cut, because layers see the micro-batch."""
        return bool(self._announcements.coupled_layers())

    def device(self) -> torch.device:
        """Where the first model's first parameter is."""
        return self._gradients.parameters[0].device

    def tell(self, sizes: Sequence[int | None], *, updates_per_epoch: int | None = None, is_final: bool = True) -> None:
        """See `Announcements.tell`."""
        self._announcements.tell(sizes, updates_per_epoch=updates_per_epoch, is_final=is_final)

    def no_calls_by_hand(self) -> AbstractContextManager[None]:
        """While held, stepping, zeroing or scheduling by hand inside a window are errors."""
        return guards.no_calls_by_hand(
            self.optimizers,
            self._schedulers,
            open_micro_batches=lambda: self.open_micro_batches,
            is_ours=lambda: self._updater.is_stepping,
        )

    def open(self, *, totals: Mapping[str, Weight] | None = None, first_share: tuple[int, int] = (1, 1)) -> None:
        """Starts a window; see `Normaliser` for what may be known of it ahead.

        Raises:
            MisuseError: a gradient is left over from something else.
        """
        if len(self._optimized) != self._count_optimized():
            self._find_parameters()
        self._gradients.begin()
        self._normaliser = Normaliser(
            seeds=self._seeds, totals=totals, first_share=first_share, at_least=self._last_total
        )
        if self.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device())
        self._started = time.perf_counter()

    def look_for_foreign_leaves(self) -> None:
        """Has the backwards of the next window looked through for parameters of other models."""
        self._looks_for_foreign = True

    def add(self, loss: Any, *, samples: int | None, weights: Mapping[str, Weight] | None = None) -> None:
        """Runs the backward of one micro-batch's loss, with its share of the whole.

        Args:
            loss: `Loss`, 0-d tensor, or a dict of these by name.
            samples: rows of the micro-batch; None where unknown.
            weights: what plain tensors of the loss are means over, where the user has said so.

        A loss that is refused, or a backward that fails, discards the window: what it had added up is not known.
        """
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before anything is added to it"
        try:
            if isinstance(loss, Tensor) and weights is None and samples and not loss.dim() and loss.requires_grad:
                seeded = normaliser.seed_root(loss, samples, is_mean=True)  # as as_loss would
                roots, seeds = ((), ()) if seeded is None else ((seeded[0],), (seeded[1],))
            elif isinstance(loss, (Tensor, Loss)) or not isinstance(loss, Mapping):
                seeded = normaliser.seed(as_loss(loss, samples, weights))
                roots, seeds = ((), ()) if seeded is None else ((seeded[0],), (seeded[1],))
            else:
                several = normaliser.seeds(as_terms(loss, samples, weights))
                roots, seeds = tuple(root for root, _ in several), tuple(seed for _, seed in several)
            if samples is not None and self._means.is_looking:
                self._check_means(loss, samples, weights or {})
            if roots:
                self._run_backward(normaliser, roots, seeds)
        except BaseException:
            before = self.discard()
            if before:
                logger.warning("a window was discarded with its first %d micro-batches: the next one raised", before)
            raise
        self._sizes.append(samples)
        self._known_samples += samples or 0

    def add_together(
        self, losses: Sequence[tuple[Any, int, Mapping[str, Weight] | None]], *, also: Sequence[Tensor] = ()
    ) -> None:
        """Runs one backward over several losses of one window, all of its losses: their totals are known by now.

        Counts no micro-batches, since who has all losses at once knows better what ran.

        Args:
            losses: each a `Loss`, a 0-d tensor or a dict of these; the rows it is over; and what its plain tensors are
                means over, where the user has said so.
            also: leaves besides the parameters whose gradients are wanted.
        """
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before anything is added to it"
        try:
            terms = [
                as_terms(loss, samples, weights)
                if isinstance(loss, Mapping)
                else {SINGLE: as_loss(loss, samples, weights)}
                for loss, samples, weights in losses
            ]
            for loss, samples, weights in losses if self._means.is_looking else ():
                self._check_means(loss, samples, weights or {})
            normaliser.expect_all_of(terms)
            seeded = [one for several in terms for one in normaliser.seeds(several)]
            if seeded:
                roots, seeds = zip(*seeded, strict=True)
                self._run_backward(normaliser, roots, seeds, also=also)
        except BaseException:
            self.discard()
            raise

    def push(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Runs the backward of outputs whose gradients are known, as they are: seeded and scaled already."""
        if outputs:
            if self._looks_for_foreign:
                self._gradients.look_for_foreign_leaves(outputs)
            self._gradients.add(tuple(outputs), tuple(gradients))

    def count(self, samples: int | None) -> None:
        """Counts a micro-batch that went into the window."""
        self._sizes.append(samples)
        self._known_samples += samples or 0

    def close(self) -> Update:
        """The update from what has been added."""
        try:
            return self._close()
        except BaseException:  # no window stays half-open: the next one would find its gradients
            self.discard()
            raise

    def _close(self) -> Update:
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before it is closed"
        normaliser.check_totals()
        parameters = self._gradients.filled(self._optimized)
        grad_norm = None
        if normaliser.is_empty:
            skipped: bool | Tensor = True
            logger.warning(
                "update %d was skipped: the weight of its batch is 0, there is nothing to learn from",
                self.counters.updates + 1,
            )
        elif not parameters:
            raise self._no_gradient()
        else:
            applied = self._updater.apply(parameters, normaliser.correction)
            grad_norm, skipped = applied.grad_norm, applied.skipped
            if skipped is True:
                logger.warning("update %d was skipped: its gradient is not finite", self.counters.updates + 1)
        return self._finish(normaliser, grad_norm, skipped)

    def close_into_grad(self, aside: Sequence[Tensor | None]) -> Loss:
        """Leaves the window's gradient in ``.grad``, added to what had been set ``aside``; makes no update."""
        normaliser = self._normaliser
        assert normaliser is not None, "a window is opened before it is closed"
        normaliser.check_totals()
        parameters = self._gradients.filled(self._gradients.parameters)
        if not parameters and not normaliser.is_empty:
            raise self._no_gradient()
        self._updater.unscale_into_grad(parameters, normaliser.correction)
        self._gradients.narrow()
        self._gradients.put_back(aside)
        means = normaliser.means()
        weight = normaliser.weight
        self._means.window_closed()
        self._reset()
        if len(means) > 1:
            return Loss(_sum_of(means), None, is_mean=False)
        return Loss(_sum_of(means), None if isinstance(weight, dict) else weight, is_mean=weight is not None)

    def discard(self) -> int:
        """Throws the open window away, and tells how many micro-batches it had."""
        lost = self.open_micro_batches
        self._gradients.clear()
        self._means.window_discarded()
        self._reset()
        return lost

    def state_dict(self) -> dict[str, int]:
        """The counters; refused while a window is open."""
        return self.counters.state_dict(open_micro_batches=self.open_micro_batches, open_samples=self.open_samples)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting from a state; refused while a window is open."""
        self.counters.load_state_dict(state, open_micro_batches=self.open_micro_batches)

    def set_aside(self) -> list[Tensor | None]:
        """Takes gradients that are there away, for `close_into_grad` to put back."""
        return self._gradients.set_aside()

    def put_back(self, aside: Sequence[Tensor | None]) -> None:
        """Puts gradients back that were set aside for a window that came to nothing."""
        self._gradients.put_back(aside)

    def _finish(self, normaliser: Normaliser, grad_norm: Tensor | None, skipped: bool | Tensor) -> Update:
        sizes = self._sizes
        is_known = None not in sizes
        counters = self.counters
        counters.updates += 1
        counters.micro_batches += len(sizes)
        counters.samples += self._known_samples
        weight = normaliser.weight
        self._last_total = weight if isinstance(weight, (int, float)) else 0.0
        means: dict[str, Tensor] = {}

        def computed() -> dict[str, Tensor]:
            if not means:
                means.update(normaliser.means())
            return means

        later: dict[str, Callable[[], Any]] = {
            "loss": lambda: _sum_of(computed()),
            "losses": lambda: {name: mean for name, mean in computed().items() if name != SINGLE},
            "skipped": lambda: bool(skipped),
        }
        update = Update(
            index=counters.updates,
            weight=weight,
            grad_norm=grad_norm,
            samples=self._known_samples if is_known else None,
            micro_batches=len(sizes),
            micro_batch_size=max(sizes) if is_known else None,  # type: ignore[type-var]
            seconds=time.perf_counter() - self._started,
            peak_bytes=torch.cuda.max_memory_allocated(self.device()) if self.device().type == "cuda" else None,
            _later=later,
        )
        self._gradients.clear(keeps_memory=len(sizes) > 1)
        self._reset()
        self._means.window_closed()
        self._looks_for_foreign = False
        return update

    def _run_backward(
        self,
        normaliser: Normaliser,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        *,
        also: Sequence[Tensor] = (),
    ) -> None:
        scaler = self._updater.loss_scale
        if scaler is not None:
            seeds = tuple(scaler.scale(seed) for seed in seeds)
        if self._looks_for_foreign:
            self._gradients.look_for_foreign_leaves(roots)
        rescale = normaliser.take_rescale()
        if rescale is not None:
            self._gradients.multiply(rescale)
        self._gradients.add(roots, seeds, also=also)

    def _check_means(self, loss: Any, samples: int, weights: Mapping[str, Weight]) -> None:
        """Plain tensors are taken as means over samples: that they were."""
        for name, plain in loss.items() if isinstance(loss, Mapping) else ((SINGLE, loss),):
            if isinstance(plain, Tensor) and name not in weights:
                self._means.check(name, plain, samples)

    def _reset(self) -> None:
        self._normaliser = None
        self._sizes = []
        self._known_samples = 0

    def _no_gradient(self) -> LossError:
        trainable = sum(parameter.requires_grad for parameter in self._optimized)
        return LossError(
            f"0 of {trainable} trainable parameters got a gradient from this window, so there is nothing to update "
            "with. The loss depends on something that requires a gradient, but on none of the model's parameters: was "
            "the model's output detached on the way?"
        )

    def _find_parameters(self) -> None:
        named = guards.named_parameters(self.models)
        guards.check_parameters(named, self.optimizers)
        self._gradients = DotGrad(named, fused=self._fused, accumulate_dtype=self._accumulate_dtype)
        self._optimized = [
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self._looks_for_foreign = True

    def _count_optimized(self) -> int:
        return sum(len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)


def _sum_of(means: Mapping[str, Tensor]) -> Tensor:
    values = list(means.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()
