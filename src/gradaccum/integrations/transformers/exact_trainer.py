"""A Trainer whose updates are the whole batch's, with the Trainer's own loop left as it is.

The loop collects the micro-batches of one update (``get_batch_samples``), calls ``training_step`` for each, and then
clips, steps, schedules, logs, calls back and saves. The mixin keeps the collected list; all but the last
``training_step`` of a window do nothing, and the last hands the whole window to `TrainStep.backward`, which leaves the
whole batch's gradient in ``.grad`` and returns the whole batch's loss. Because the window is in hand there, out of
memory at a constant batch, BatchNorm over the batch and router losses over the batch are those of `TrainStep`.

What is different from the loop's point of view: a stream's short last window reaches its boundary (it is filled up with
micro-batches without rows), the rows that Accelerate repeats to make processes even are cut off again, and the loss of
a window is logged once, with its last micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gradaccum.errors import MisuseError, WindowError
from gradaccum.integrations.transformers import trainer_support as support
from gradaccum.integrations.transformers.embedding_loss import EmbeddingLoss
from gradaccum.integrations.transformers.router_losses import RouterLosses
from gradaccum.integrations.transformers.trainer_loss import TrainerLoss
from gradaccum.integrations.transformers.trainer_windows import AsCollated, no_rows, parts_of, rows_of, some_rows
from gradaccum.losses.normaliser import SINGLE
from gradaccum.train_step import TrainStep
from gradaccum.types import Split
from gradaccum.whole_batch.runners import BatchNorm
from gradaccum.window.weights import WeightsFunction, add_weights, weights_by_name

if TYPE_CHECKING:
    from gradaccum.auditing.audit_report import Report

_UNCUT = 2**31
"""A micro-batch size that cuts nothing the loader yields."""


class ExactMixin:
    """Makes the updates of a transformers ``Trainer``, or of a class derived from it, the whole batch's.

    ``class ExactSFT(ExactMixin, SFTTrainer)``. Arguments, loop, callbacks, logs and checkpoints are the Trainer's; so
    are ``per_device_train_batch_size`` and ``gradient_accumulation_steps``. ``compute_loss`` and ``compute_loss_func``
    may return a mean, a `Loss`, or a dict of `Loss` by name. ``auto_find_batch_size=True`` means
    ``micro_batch_size="auto"``: the batch stays, only the pieces that it is run in get smaller.

    Args:
        args: for the Trainer, as are all other arguments.
        micro_batch_size: None to run micro-batches as the loader yields them; an int or "auto" to cut them further. For
            "auto" let the loader yield the whole batch: ``gradient_accumulation_steps=1``.
        batch_norm: see `TrainStep`.
        split: how a micro-batch of the loader is cut further; in equal pieces if None.
        weights: ``weights(micro_batch)`` counts what the means of the loss are over, for one micro-batch of the loader;
            needed where the loss is a dict whose terms are means over different things.
        router_loss: what a mixture of experts' load-balancing loss is taken over: the whole "batch", or each "micro"
            batch, weighted.
        check: "first": see `TrainStep`; rows of the first window's largest micro-batch are looked at. "off": nothing is
            checked. A mean whose graph says nothing is measured either way.

    Raises:
        UnsupportedError: the gradients of this Trainer, or of this version of transformers, cannot be made exact.
        WindowError: an option has none of its values.
    """

    _exact: _ExactWindows

    def __init__(
        self,
        *args: Any,
        micro_batch_size: int | Literal["auto"] | None = None,
        batch_norm: BatchNorm = "micro",
        split: Split | None = None,
        weights: WeightsFunction | None = None,
        router_loss: Literal["batch", "micro"] = "batch",
        check: Literal["first", "off"] = "first",
        **kwargs: Any,
    ) -> None:
        support.check_framework()
        support.check_class(type(self))
        super().__init__(*args, **kwargs)
        self._exact = _ExactWindows(
            self,
            super().training_step,  # type: ignore[misc]
            micro_batch_size=micro_batch_size,
            batch_norm=batch_norm,
            split=split,
            weights=weights,
            router_loss=router_loss,
            check=check,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with out of memory handled a window at a time."""
        with self._exact.finds_sizes():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Collects a window, as the Trainer does; its items are counted when their losses are there."""
        return self._exact.collect(epoch_iterator, num_batches), None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Nothing but for the window's last micro-batch; with that, the whole window's backward and its loss."""
        return self._exact.step(model)

    def audit(self, micro_batch_size: int = 1) -> Report:
        """`gradaccum.audit` of the first micro-batch that the training loader yields, with this trainer's loss."""
        return self._exact.audit(micro_batch_size)


def exact(
    trainer: Any,
    *,
    micro_batch_size: int | Literal["auto"] | None = None,
    batch_norm: BatchNorm = "micro",
    split: Split | None = None,
    weights: WeightsFunction | None = None,
    router_loss: Literal["batch", "micro"] = "batch",
    check: Literal["first", "off"] = "first",
) -> Any:
    """Makes the updates of one ``Trainer`` that is there already the whole batch's; options as for `ExactMixin`.

    Its class gets the mixin in front; other trainers of that class are as they were.

    Returns:
        The trainer itself.

    Raises:
        UnsupportedError, WindowError: see `ExactMixin`.
    """
    cls = type(trainer)
    support.check_framework()
    support.check_class(cls)
    if not isinstance(trainer, ExactMixin):
        training_step = trainer.training_step
        windows = _ExactWindows(
            trainer,
            training_step,
            micro_batch_size=micro_batch_size,
            batch_norm=batch_norm,
            split=split,
            weights=weights,
            router_loss=router_loss,
            check=check,
        )
        trainer.__class__ = type(f"Exact{cls.__name__}", (ExactMixin, cls), {"__module__": cls.__module__})
        trainer._exact = windows
    return trainer


class _ExactWindows:
    """The windows of one trainer, one after another."""

    def __init__(
        self,
        trainer: Any,
        training_step: Callable[..., Any],
        *,
        micro_batch_size: int | Literal["auto"] | None,
        batch_norm: BatchNorm,
        split: Split | None,
        weights: WeightsFunction | None,
        router_loss: Literal["batch", "micro"],
        check: Literal["first", "off"],
    ) -> None:
        support.check_trainer(trainer)
        if router_loss not in ("batch", "micro") or check not in ("first", "off"):
            raise WindowError(
                f'router_loss={router_loss!r}, check={check!r}: router losses are taken over the whole "batch" or each '
                '"micro" batch, and a few rows of the "first" window are held against the whole or not ("off").'
            )
        self._trainer = trainer
        self._size: int | Literal["auto"] | None = micro_batch_size
        self._finds = trainer.args.auto_find_batch_size
        self._batch_norm: BatchNorm = batch_norm
        self._split = AsCollated(further=split, keeps_pairs=support.keeps_pairs(type(trainer)))
        self._weights = weights
        self._over_batch = router_loss == "batch"
        self._check: Literal["first", "off"] = check
        self._loss = TrainerLoss(trainer, says_weights=weights is not None)
        self._training_step = training_step
        self._made_for: tuple[Any, Any] | None = None
        self._train_step: TrainStep | None = None
        self._window: list[Any] = []
        self._length = self._seen = 0
        self._updates_before: int | None = None

    @contextmanager
    def finds_sizes(self) -> Iterator[None]:
        """Context manager in which Accelerate does not restart training with another batch where memory runs out."""
        args = self._trainer.args
        before = args.auto_find_batch_size
        self._finds, args.auto_find_batch_size = self._finds or before, False
        self._updates_before = None
        try:
            yield
        finally:
            args.auto_find_batch_size = before

    def collect(self, iterator: Any, number: int) -> list[Any]:
        """The next window's micro-batches; of a stream also as many without rows as the loop needs to reach its end."""
        self._check_stepped()
        found: list[Any] = []
        for _ in range(number):
            try:
                found.append(next(iterator))
            except StopIteration:
                break
        if not found:
            return []
        self._cut_repeated(found)
        self._window, self._seen = list(found), 0
        if support.is_stream(self._trainer):  # the loop steps when it has seen as many as there are to a window
            found += [no_rows(found[-1])] * (number - len(found))
        self._length = len(found)
        return found

    def step(self, model: Any) -> Tensor:
        """One call of the loop: the window's gradient and loss with the last one, 0 with those before."""
        device = self._trainer.args.device
        self._seen += 1
        if self._seen > self._length:
            raise MisuseError(
                f"training_step was called {self._seen} times for a window of {self._length} micro-batches. The loop "
                "is not the Trainer's, and the gradient would be the window's twice. Let Trainer.train run it."
            )
        if self._seen < self._length:
            return torch.zeros((), device=device)
        window, self._window = self._window, []
        self._updates_before = self._trainer.state.global_step
        with self._loss.standing_in():
            # The Trainer unscales by itself, before it clips.
            is_scaled = self._trainer.accelerator.scaler is not None
            loss = self._step_of(model).backward(window, unscale=not is_scaled)
        return loss.value.to(device=device, dtype=torch.float32)

    def audit(self, micro_batch_size: int) -> Report:
        """See `ExactMixin.audit`."""
        from gradaccum.audit_model import audit  # training does not wait for it

        trainer = self._trainer
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.accelerator.unwrap_model(trainer.model)
        return audit(model, self._loss.plain, batch, micro_batch_size=micro_batch_size)

    def _step_of(self, model: Any) -> TrainStep:
        optimizer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper
            optimizer = optimizer.optimizer
        before = self._made_for
        if self._train_step is not None and before is not None and before[0] is model and before[1] is optimizer:
            return self._train_step
        size = self._size if self._size is not None else "auto" if self._finds else _UNCUT
        options: dict[str, Any] = {
            "micro_batch_size": size,
            "split": self._split,
            "batch_norm": self._batch_norm,
            "scaler": self._trainer.accelerator.scaler,
            "check": self._check,
        }
        # A method in the functions' closures: what the trainer counts and logs, a check then puts back.
        training_step = self._training_step
        coupled = self._coupled(model)
        if coupled is not None:
            options |= {"batch_loss": coupled.batch_loss, "combine": coupled.combine}
            options["forward"] = lambda _, batch: coupled.forward(batch, training_step)
            if isinstance(coupled, RouterLosses) and not self._over_batch:
                options["check"] = "off"  # asked for as they are, which is not the batch's
        else:
            options["loss_fn"] = lambda _, batch: self._loss.of(model, batch, training_step)
            if self._weights is not None:
                options["weights"] = self._weights_of
        models = [model, *support.modules_besides(self._trainer, model)]
        self._train_step, self._made_for = TrainStep(models, optimizer, **options), (model, optimizer)
        return self._train_step

    def _coupled(self, model: Any) -> RouterLosses | EmbeddingLoss | None:
        """What makes the loss of the whole batch, where micro-batches' losses do not add up to it."""
        computed = functools.partial(self._loss.computed, model)
        plain_model = self._trainer.accelerator.unwrap_model(model)
        if RouterLosses.are_in(plain_model):
            return RouterLosses(plain_model, computed, over_batch=self._over_batch)
        if EmbeddingLoss.is_in(self._trainer):
            return EmbeddingLoss(self._trainer, computed)
        return None

    def _weights_of(self, batch: Any) -> Any:
        assert self._weights is not None
        totals: dict[str, Any] = {}
        for one in parts_of(batch):
            totals = add_weights(totals, weights_by_name(self._weights(one)))
        return totals[SINGLE] if totals.keys() == {SINGLE} else totals

    def _cut_repeated(self, found: list[Any]) -> None:
        """Cuts the rows off that Accelerate has repeated to give every process as many: they would count twice."""
        trainer = self._trainer
        state, last = trainer.accelerator.gradient_state, found[-1]
        if trainer.args.world_size == 1 or not trainer.accelerator.even_batches:
            return
        if not (state.end_of_dataloader and state.remainder > 0):
            return
        mine = rows_of(last)
        own = min(max(state.remainder - trainer.args.process_index * mine, 0), mine)
        if own < mine:
            found[-1] = some_rows(last, slice(0, own))

    def _check_stepped(self) -> None:
        """Between two windows that were run the loop has stepped once."""
        before, now = self._updates_before, self._trainer.state.global_step
        if before is not None and now != before + 1:
            raise MisuseError(
                f"The Trainer counted {now - before} updates between two windows of which the first had its backward. "
                "Its gradient would be added to the next window's, or be applied twice. One update a window is what "
                "Trainer._run_epoch makes; a loop of your own calls for ga.TrainStep."
            )
        self._updates_before = None
