"""One micro-batch's loss, as the Trainer and its subclasses compute it, and what it is a mean over.

The Trainer's own ``training_step`` runs for every micro-batch, so whatever it and a subclass do around the forward is
done: autocast, offloading, context parallelism, metrics. Two attributes of the instances stand in meanwhile: the
accelerator's ``backward`` runs none, and ``compute_loss`` notes what it returned, before the framework divides it. They
are set once a window and keep what they note by thread, since micro-batches may run in lockstep.

The loss is asked for as a mean over the micro-batch: without ``num_items_in_batch``, which models and trainers use in
ways of their own (some divide by it, some take a token a row too many, some ignore it), and for a
``compute_loss_func``, which has to divide by something, with the micro-batch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BatchError, LossError
from gradaccum.integrations.mean_by_numbers import MeanByNumbers
from gradaccum.integrations.transformers.trainer_support import keeps_pairs
from gradaccum.integrations.transformers.trainer_windows import AsCollated, TrainerBatch, rows_of
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.meaning import means_in

_ROUNDING = 1e-5  # of sums of fp32 class weights; a real mismatch is a whole item's weight


class TrainerLoss:
    """The losses of a trainer's micro-batches.

    Args:
        trainer: the instance.
        training_step: what its class makes of one micro-batch, without the mixin.
        says_weights: whether the user counts the weights, so that nothing is to be found out.
        checks: whether losses that can be read are measured too, once.
    """

    def __init__(self, trainer: Any, training_step: Any, *, says_weights: bool, checks: bool) -> None:
        self._trainer = trainer
        self._training_step = training_step
        self._says_weights = says_weights
        self._here = threading.local()
        self._ratios: list[float] | None = None
        self._numbers = MeanByNumbers(rows_of, self._halves) if checks else None
        self._is_standing_in = False

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Context manager for a window: no backward is run by the Trainer, and its losses are noted."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        compute_loss = trainer.compute_loss

        def noting(
            model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            found = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=self._count(inputs))
            loss = found[0] if return_outputs else found
            self._here.losses.append(loss)
            plain = _plain(loss)
            return (plain, *found[1:]) if return_outputs else plain

        args, steps = trainer.args, trainer.current_gradient_accumulation_steps
        average = args.average_tokens_across_devices
        before = {
            (owner, name): owner.__dict__[name]
            for owner, name in ((trainer, "compute_loss"), (accelerator, "backward"))
            if name in owner.__dict__
        }
        trainer.compute_loss, accelerator.backward = noting, lambda loss, **kwargs: None
        trainer.current_gradient_accumulation_steps, args.average_tokens_across_devices = 1, False
        self._is_standing_in = True
        try:
            yield
        finally:
            self._is_standing_in = False
            del trainer.compute_loss, accelerator.backward
            for (owner, name), value in before.items():
                setattr(owner, name, value)
            trainer.current_gradient_accumulation_steps, args.average_tokens_across_devices = steps, average

    def of(self, model: Any, inputs: Any) -> Any:
        """A micro-batch's loss with its graph: a `Loss` or a dict of them; plain where the user counts the weights.

        Raises:
            LossError: the Trainer computed none or several, or it cannot be found out what it is a mean over.
        """
        loss = self.computed(model, inputs)
        if isinstance(loss, Tensor) and not self._says_weights:
            loss = Loss.mean(loss, over=self._weight(loss, model, inputs))
        scaler = self._trainer.accelerator.scaler
        return loss if scaler is None else scaled(loss, scaler)

    def measures_nothing(self) -> None:
        """Leaves the measuring out, for losses with a part that is no mean (a router loss)."""
        self._numbers = None

    def plain(self, model: Any, inputs: Any) -> Loss:
        """The loss of a micro-batch outside of a window, for an audit."""
        loss = self._trainer.compute_loss(model, dict(inputs), num_items_in_batch=self._count(inputs))
        return loss if not isinstance(loss, Tensor) else Loss.mean(loss, over=self._read(loss) or rows_of(inputs))

    def computed(self, model: Any, inputs: Any) -> Any:
        """What ``compute_loss`` returned for a micro-batch, neither divided nor scaled."""
        self._here.losses = []
        self._training_step(model, dict(inputs) if isinstance(inputs, Mapping) else inputs, None)
        losses = self._here.losses
        if len(losses) != 1:
            raise LossError(
                f"{type(self._trainer).__name__}.training_step computed {len(losses)} losses for one micro-batch of "
                f"{rows_of(inputs)} rows; which of them to train with is not known, and the gradient would be that of "
                "something else. Return one loss (or a dict of ga.Loss) from compute_loss, and call it once."
            )
        return losses[0]

    def _count(self, inputs: Any) -> Any:
        """What a ``compute_loss_func`` divides by: the micro-batch's own count."""
        trainer = self._trainer
        if trainer.compute_loss_func is None:
            return None
        average, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
        try:
            return trainer._get_num_items_in_batch([inputs], trainer.args.device)
        finally:
            trainer.args.average_tokens_across_devices = average

    def _weight(self, loss: Tensor, model: Any, inputs: Any) -> Weight:
        weight = self._read(loss)
        numbers = self._numbers
        if weight is None and numbers is None:
            numbers = self._numbers = MeanByNumbers(rows_of, self._halves)
        if numbers is None or not numbers.is_wanted(weight is None, inputs):
            return weight if weight is not None else numbers.count(inputs)  # type: ignore[union-attr]
        numbers.measure(inputs, lambda rows: self._measured(model, rows))
        return numbers.count(inputs) if weight is None else weight

    def _read(self, loss: Tensor) -> Weight | None:
        """What a plain mean is over, by its graph; None where that says nothing.

        Raises:
            LossError: it is several means over different things.
        """
        counts = [mean.count for mean in means_in(loss)]
        if len(counts) < 2:
            return counts[0] if counts else None
        numbers = [float(count) for count in counts]
        if not all(numbers):
            return 0 if not any(numbers) else self._refuse(numbers)
        ratios = [number / numbers[0] for number in numbers]
        if self._ratios is None or len(self._ratios) != len(ratios):
            self._ratios = ratios
        elif any(abs(a - b) > _ROUNDING * max(a, b) for a, b in zip(ratios, self._ratios, strict=True)):
            return self._refuse(numbers)
        return counts[0]

    def _refuse(self, numbers: list[float]) -> Weight:
        shown = ", ".join(f"{number:g}" for number in numbers)
        known = (
            "" if self._ratios is None else f", and in ratios of {', '.join(f'{r:.4g}' for r in self._ratios)} before"
        )
        raise LossError(
            f"The loss is a sum of means over different things: {shown} in this micro-batch{known}. No single weight "
            "is right for all of them, so the gradient of some term would be off. Return the terms by name from "
            'compute_loss, {"first": ga.Loss.mean(first, over=n), ...}, and pass weights=lambda micro_batch: {"first": '
            "n, ...}."
        )

    def _halves(self, inputs: Any) -> list[Any] | None:
        """A micro-batch in two; None where it cannot be cut, or where every forward waits for other processes."""
        if any(hasattr(parameter, "device_mesh") for parameter in self._trainer.model.parameters()):
            return None
        split, whole = AsCollated(keeps_pairs=keeps_pairs(type(self._trainer))), TrainerBatch.of([inputs])
        try:
            parts = [split.cut(whole, rows).inputs for rows in split.plan(whole, -(-len(whole.rows) // 2))]
        except BatchError:
            return None
        return parts if len(parts) == 2 else None

    def _measured(self, model: Any, inputs: Any) -> tuple[float, float | None]:
        """Value and read-off count of the loss of some rows, in evaluation mode; leaves no trace."""
        trainer, was = self._trainer, [(module, module.training) for module in model.modules()]
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
        model.eval()
        try:
            with torch.random.fork_rng(devices), torch.enable_grad(), trainer.compute_loss_context_manager():
                self._here.losses = []
                trainer.compute_loss(model, trainer._prepare_inputs(dict(inputs)))
        finally:
            for module, mode in was:
                module.training = mode
        (loss,) = self._here.losses
        if not isinstance(loss, Tensor):
            loss = _plain(loss)
        means = means_in(loss)
        return float(loss.detach()), float(means[0].count) if means else None


def _plain(loss: Any) -> Any:
    """A tensor for the framework to go on with, which it divides and hands to the backward that is none."""
    if isinstance(loss, Loss):
        return loss.value.detach()
    if isinstance(loss, Mapping):
        return torch.stack([_plain(term).float() for term in loss.values()]).sum()
    return loss.detach() if isinstance(loss, Tensor) else loss


def scaled(loss: Any, scaler: Any) -> Any:
    """The loss times the loss scale, as the Trainer's own backward would have scaled it."""
    if isinstance(loss, Mapping):
        return {name: scaled(term, scaler) for name, term in loss.items()}
    if isinstance(loss, Loss):
        return Loss(scaler.scale(loss.root), loss.weight, loss.is_mean)
    return scaler.scale(loss)
