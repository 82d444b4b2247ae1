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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BatchError, LossError
from gradaccum.integrations.mean_by_numbers import MeanByNumbers
from gradaccum.integrations.transformers.trainer_support import keeps_pairs
from gradaccum.integrations.transformers.trainer_windows import AsCollated, rows_of
from gradaccum.losses.loss import Loss, Weight
from gradaccum.losses.weight_of import weight_of


class TrainerLoss:
    """The losses of a trainer's micro-batches.

    Args:
        trainer: the instance.
        says_weights: whether the user counts the weights, so that nothing is to be found out.
    """

    def __init__(self, trainer: Any, *, says_weights: bool) -> None:
        self._trainer = trainer
        self._says_weights = says_weights
        self._here = threading.local()
        self._numbers = MeanByNumbers(rows_of, self._halves)

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
        try:
            yield
        finally:
            del trainer.compute_loss, accelerator.backward
            for (owner, name), value in before.items():
                setattr(owner, name, value)
            trainer.current_gradient_accumulation_steps, args.average_tokens_across_devices = steps, average

    def of(self, model: Any, inputs: Any, training_step: Callable[..., Any]) -> Any:
        """A micro-batch's loss with its graph: a `Loss` or a dict of them; plain where the user counts the weights.

        Raises:
            LossError: the Trainer computed none or several, or it cannot be found out what it is a mean over.
        """
        loss = self.computed(model, inputs, training_step)
        if isinstance(loss, Tensor) and not self._says_weights:
            loss = Loss.mean(loss, over=self._weight(loss, model, inputs))
        return loss

    def plain(self, model: Any, inputs: Any) -> Loss:
        """The loss of a micro-batch outside of a window, for an audit."""
        loss = self._trainer.compute_loss(model, dict(inputs), num_items_in_batch=self._count(inputs))
        if not isinstance(loss, Tensor):
            return loss
        try:
            return weight_of(loss)
        except LossError:  # measured in a window, or a guess that the audit will find fault with
            return Loss.mean(loss, over=self._numbers.count_or_none(inputs) or rows_of(inputs))

    def computed(self, model: Any, inputs: Any, training_step: Callable[..., Any]) -> Any:
        """What ``compute_loss`` returned for a micro-batch, neither divided nor scaled.

        ``training_step`` is what the trainer's own class makes of a micro-batch, without the mixin.
        """
        self._here.losses = []
        training_step(model, dict(inputs) if isinstance(inputs, Mapping) else inputs, None)
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
        """What a plain mean is over: by its graph, and where that says nothing, measured."""
        try:
            weight = weight_of(loss).weight
            assert weight is not None, "it is a mean over something"
            return weight
        except LossError as unread:
            try:
                if self._numbers.is_wanted(inputs):
                    self._numbers.measure(inputs, lambda rows: self._measured(model, rows))
                return self._numbers.count(inputs)
            except LossError as error:
                raise LossError(f"{error} What its graph says: {unread}") from unread

    def _halves(self, inputs: Any) -> list[Any] | None:
        """A micro-batch in two; None where it cannot be cut, or where every forward waits for other processes."""
        if any(hasattr(parameter, "device_mesh") for parameter in self._trainer.model.parameters()):
            return None
        split = AsCollated(keeps_pairs=keeps_pairs(type(self._trainer)))
        try:
            parts = [split.cut(inputs, rows) for rows in split.plan(inputs, -(-rows_of(inputs) // 2))]
        except BatchError:
            return None
        return parts if len(parts) == 2 else None

    def _measured(self, model: Any, inputs: Any) -> float:
        """The loss of some rows, in evaluation mode; leaves no trace."""
        trainer, was = self._trainer, [(module, module.training) for module in model.modules()]
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
        model.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), trainer.compute_loss_context_manager():
                self._here.losses = []
                trainer.compute_loss(model, trainer._prepare_inputs(dict(inputs)))
        finally:
            for module, mode in was:
                module.training = mode
        (loss,) = self._here.losses
        return float(_plain(loss))


def _plain(loss: Any) -> Any:
    """A tensor for the framework to go on with, which it divides and hands to the backward that is none."""
    if isinstance(loss, Loss):
        return loss.value.detach()
    if isinstance(loss, Mapping):
        return torch.stack([_plain(term).float() for term in loss.values()]).sum()
    return loss.detach() if isinstance(loss, Tensor) else loss
