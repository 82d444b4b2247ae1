"""What is read of a window while it runs: what its losses are means over, and the state that its forwards change.

Neither runs anything of the user's again. Losses are read off their graphs (`losses/meaning`), state by the counters of
changes that torch keeps (`forward_state`). What was read goes into the plan line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradaccum.losses.loss import Weight
from gradaccum.losses.meaning import SampleMeans
from gradaccum.window import guards
from gradaccum.window.forward_state import ForwardState
from gradaccum.window.plan_line import PlanLine


class LossReading:
    """Reads the losses and forwards of one window after another, as far as there is anything left to find.

    Args:
        models: whose buffers are watched.
        plan_line: which says what was read.
        reads: whether anything is read at all.
        watches_state: whether changes of buffers are faults of the forwards.
        warns_of_unknown: see `SampleMeans`.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        plan_line: PlanLine,
        reads: bool,
        *,
        watches_state: bool,
        warns_of_unknown: bool,
    ) -> None:
        self._means = SampleMeans(warns_of_unknown=warns_of_unknown)
        self._means.is_looking = reads
        self._state = ForwardState(models)
        self._state.is_looking = watches_state
        self._plan_line = plan_line

    def leave_to_check(self, *, was_checked: bool) -> None:
        """Leaves to a check before the first update what it has seen, or warns of what it has not."""
        self._means.warns_of_unknown = not was_checked
        self._state.is_looking = self._state.is_looking and not was_checked

    def window_begins(self) -> None:
        """Notes the state before a window's first forward."""
        if self._state.is_looking:
            self._state.window_begins()

    def has_run(
        self,
        loss: Any,
        samples: int | None,
        weights: Mapping[str, Weight] | None,
        roots: Sequence[Tensor] = (),
    ) -> None:
        """Reads one micro-batch's loss, before its backward.

        Args:
            loss: as the user's function returned it.
            samples: rows of the micro-batch; None where unknown.
            weights: what its plain tensors are means over, where the user has said so.
            roots: where its backward starts; none where forwards of several micro-batches came before.

        Raises:
            MeanError: it is not what it is taken for.
        """
        if self._means.is_looking:
            self._means.check_all(loss, samples, weights or {})
        if self._state.is_looking and roots:
            self._state.has_run(roots)
        if self._plan_line.waits:
            self._plan_line.tell(self._means.evidence())

    def window_complete(self, micro_batches: int) -> None:
        """Looks at a window as a whole, before anything is made of its gradient.

        Raises:
            MeanError: sums were divided by what the whole window has.
        """
        if self._means.is_looking:
            self._means.window_complete(guards.warn)
        if self._state.is_looking:
            text = self._state.window_complete(micro_batches)
            if text:
                guards.warn(text)

    def window_closed(self) -> None:
        """Decides what of later windows is read."""
        self._means.window_closed()

    def window_discarded(self) -> None:
        """Forgets what has been read of the open window."""
        self._means.window_discarded()
