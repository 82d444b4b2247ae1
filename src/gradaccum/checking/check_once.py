"""When a step is looked at: once, before the first batch that is cut; and what becomes of what was found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from gradaccum.checking.step_to_check import StepToCheck
from gradaccum.errors import GradAccumWarning, WindowError
from gradaccum.split.asked import rows_in
from gradaccum.types import Rows
from gradaccum.window.accumulation import Accumulation
from gradaccum.window.guards import user_stack_level
from gradaccum.window.plan_line import NOT_CHECKED, NOTHING_IS_CUT


class CheckOnce:
    """The check before a step's first update.

    Args:
        accumulation: whose plan line says what was found, and whose processes take part.
        step: what is looked at.
        check: "first"; or "off", for no look at all.

    Raises:
        WindowError: ``check`` is neither.
    """

    def __init__(self, accumulation: Accumulation, step: StepToCheck, *, check: str) -> None:
        if check not in ("first", "off"):
            raise WindowError(
                f"check={check!r}: before the first update the step holds itself against the whole on a few rows "
                '("first"), or not ("off").'
            )
        self._accumulation, self._step = accumulation, step
        self._is_due = check == "first"
        if not self._is_due:
            accumulation.plan_line.evidence = f'{NOT_CHECKED}: check="off"'

    def before_run(self, batch: Any, pieces: Sequence[Rows] | None) -> None:
        """Holds a few rows of a batch in pieces against the same rows together, if that is due.

        Args:
            batch: about to be trained with.
            pieces: the micro-batches that training is about to run; None for two halves at most, as "auto" begins.

        Raises:
            LossError: the loss does not add up as it is declared; again at the next batch.
        """
        if not self._is_due:
            return
        accumulation = self._accumulation
        pieces = self._halves(batch) if pieces is None else pieces
        if accumulation.ranks is None and len(pieces) < 2:
            accumulation.plan_line.evidence = NOTHING_IS_CUT
            return
        from gradaccum.checking.first_check import look_first  # when it is due

        found = look_first(self._step, batch, pieces, ranks=accumulation.ranks)
        accumulation.plan_line.evidence = found.evidence
        if found.error is not None:
            raise found.error  # and again, should somebody go on after it
        self._is_due = False
        accumulation.leave_to_check(
            was_checked=not found.evidence.startswith(NOT_CHECKED), has_warned=found.warning is not None
        )
        if found.warning is not None and (accumulation.ranks is None or accumulation.ranks.is_first):
            warnings.warn(found.warning, GradAccumWarning, stacklevel=user_stack_level())

    def _halves(self, batch: Any) -> Sequence[Rows]:
        rows = rows_in(self._step.split, batch)
        return [slice(0, rows - rows // 2), slice(rows - rows // 2, rows)] if rows > 1 else [slice(0, rows)]
