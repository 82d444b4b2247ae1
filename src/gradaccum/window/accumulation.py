"""One window after another: the algorithm that both ways of training share.

    open     what is known of the window ahead: its total weight, or the share of it that the first micro-batch is
    add      loss -> (sum, weight w_b) -> seed w_b / E -> backward, which adds  (w_b / E) grad l_b  to ``.grad``
    settle   the sums, weights and gradients of all processes; what is left to multiply by is E / W
    close    finite? clip, step, schedule: an `Update`. Or `close_into_grad`, which steps nothing; or `discard`

Who decides where a window ends, the user's loop or the batch in hand, is not known here. E and W are explained in
`losses/normaliser`, the sum over processes in `over_ranks`, the step in `update`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.losses.loss import Loss
from gradaccum.losses.normaliser import Normaliser
from gradaccum.losses.terms import no_gradient
from gradaccum.types import Update
from gradaccum.window.loss_scale import check_stays_scaled
from gradaccum.window.open_window import OpenWindow
from gradaccum.window.profile_ranges import stage
from gradaccum.window.stepped import Stepped
from gradaccum.window.window_result import WindowResult, loss_of, update_of

logger = logging.getLogger("gradaccum")


class Accumulation(OpenWindow):
    """Adds up the gradients of a window's micro-batches and makes the update from them."""

    # --------------------------------------------------------------------------------------------------- settle, close

    def _settle(self, parameters: Sequence[nn.Parameter], *, is_done: bool = False) -> WindowResult:
        """What the window had in all; gradients of other processes are added up here."""
        normaliser, stops = self._opened(), self.stopping is not None and self.stopping.is_wanted
        if self.ranks is None:
            result = WindowResult.of(self._sizes, normaliser.correction)
        else:
            flags = {"is_done": is_done, "wants_to_stop": stops}
            with stage("reduce"):
                result = self.ranks.settle(normaliser, parameters, sizes=self._sizes, **flags)
            if self._noise_scale is not None and not self._is_for_user and not result.is_over:
                self._noise_scale.add_up(self.ranks.ranks)
        if self.stopping is not None:
            self.stopping.is_heard_of = result.stops
        return result

    def leave_if_agreed(self) -> None:
        """Saves and ends the process where all of them have agreed to; called between windows.

        Raises:
            Stopped: they have.
        """
        if self.stopping is not None and self.stopping.is_agreed and not self.is_open:
            self.stopping.leave()

    def close(self) -> Update:
        """The update from what has been added."""
        update = self.close_with_others()
        assert update is not None, "a window closed here is closed everywhere"
        return update

    def close_with_others(self, *, is_done: bool = False, drops_incomplete: bool = False) -> Update | None:
        """The update from what has been added here and on other processes; None where all are done, or it was dropped.

        With ``is_done`` this process has no more windows, and only takes part in those of others; with
        ``drops_incomplete`` there is no update where some process is done.
        """
        try:
            result = self._settle(self._parameters.optimized, is_done=is_done)
            if result.is_over or (result.is_incomplete and drops_incomplete):
                self.discard()
                return None
            return self._close(self._opened(), result)
        except BaseException:  # no window stays half-open: the next one would find its gradients
            self.discard()
            raise

    def _close(self, normaliser: Normaliser, result: WindowResult) -> Update:
        if self.ranks is not None:
            self.ranks.half_updates.is_stepping = True
        normaliser.check_totals()
        self.reading.window_complete(len(self._sizes))
        parameters = self._gradients.filled(self._parameters.optimized)
        grad_norm: Tensor | None = None
        skipped: bool | Tensor = True
        index = self.counts.updates + 1
        counted = result.micro_batches, self.open_samples if result.samples is None else result.samples
        stepped = Stepped(self.optimizers)
        try:
            if normaliser.is_empty:
                if self.ranks is None or self.ranks.is_first:
                    text = "update %d was skipped: the weight of its batch is 0, there is nothing to learn from"
                    logger.warning(text, index)
            elif not parameters:
                raise no_gradient(self._parameters.optimized)
            else:
                with stage("step"), stepped:
                    grad_norm, skipped = self._updater.apply(parameters, result.correction)
                if skipped is True and (self.ranks is None or self.ranks.is_first):
                    logger.warning("update %d was skipped: its gradient is not finite", index)
            noise_scale = self._noise_scale
            if noise_scale is not None:
                is_sum = normaliser.weight is None
                noise_scale.measure_whole(grad_norm, samples=result.samples, is_sum=is_sum)
            update = update_of(
                normaliser,
                result,
                index=index,
                grad_norm=grad_norm,
                skipped=skipped,
                spent=self.clock.closed(waited=self._waited()),
                noise_scale=_nothing if noise_scale is None else noise_scale.reader(),
                peak_bytes=torch.cuda.max_memory_allocated(self.device()) if self.device().type == "cuda" else None,
            )
            self.counts.add(*counted)
        except BaseException:  # Ctrl-C, or a scheduler that fails, after the step: the update was made
            if stepped.all and self.counts.updates < index:
                self.counts.add(*counted)
            raise
        self._gradients.clear(keeps_memory=len(self._sizes) > 1)
        self._last_total = update.weight if isinstance(update.weight, (int, float)) else 0.0
        self.reading.window_closed()
        self._reset()
        if self.ranks is not None:
            self.ranks.stepped()
        return update

    def close_into_grad(self, aside: Sequence[Tensor | None], *, unscales: bool = True) -> Loss:
        """Leaves the window's gradient in ``.grad``, added to what had been set ``aside``; makes no update.

        With ``unscales`` a loss scale is divided out again.
        """
        normaliser = self._opened()
        result = self._settle(self._gradients.parameters)
        normaliser.check_totals()
        self.reading.window_complete(len(self._sizes))
        parameters = self._gradients.filled(self._gradients.parameters)
        if not parameters and not normaliser.is_empty:
            raise no_gradient(self._parameters.optimized)
        self._updater.into_grad(parameters, result.correction, unscales=unscales)
        self._gradients.narrow()
        self.put_back(aside)
        if unscales and self._updater.loss_scale is not None:
            self._updater.loss_scale.mark_unscaled()
        loss = loss_of(normaliser)
        self.reading.window_closed()
        self._reset()
        return loss

    def set_aside(self, *, unscales: bool = True) -> list[Tensor | None]:
        """Takes gradients that are there away, for `close_into_grad` to put back."""
        self._find_parameters()
        if not unscales:
            check_stays_scaled(self._updater.loss_scale, self._options.scaler, self.optimizers)
        self._is_for_user = True
        return self._gradients.set_aside()

    def put_back(self, aside: Sequence[Tensor | None]) -> None:
        """Puts gradients back that were set aside for a window that came to nothing."""
        self._is_for_user = False
        self._gradients.put_back(aside)

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the noise scale's averages; refused while a window is open."""
        counts = self.counts.state_dict(open_micro_batches=self.open_micro_batches, open_samples=self.open_samples)
        return counts if self._noise_scale is None else {**counts, "noise_scale": self._noise_scale.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses what cannot be loaded, and loads nothing."""
        self.counts.check(state, open_micro_batches=self.open_micro_batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from a state; refused while a window is open."""
        self.counts.load_state_dict(state, open_micro_batches=self.open_micro_batches)
        if self._noise_scale is not None and "noise_scale" in state:
            self._noise_scale.load_state_dict(state["noise_scale"])
        if self.ranks is not None:
            self.ranks.half_updates.forget()


def _nothing() -> None:
    """What is read where nothing measured it."""
