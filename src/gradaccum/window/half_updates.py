"""An update that some processes have made and others have not: nothing may be added up after it.

Between the sum of the gradients and the message after the step each process is alone with its optimizer, its schedulers
and ``before_step``. If one of these raises on one process, the others have stepped. From there on gradients are of
different parameters, or steps of different rates, and a sum of them is the gradient of no model. So all processes
refuse further updates and checkpoints, until a state is loaded.
"""

from __future__ import annotations

from gradaccum.errors import RankError


class HalfUpdates:
    """What is known of the last update on all processes.

    Attributes:
        is_stepping: gradients have been added up, and it has not been heard that all have made an update of them.
    """

    def __init__(self) -> None:
        self.is_stepping = False
        self._said: str | None = None

    @property
    def error(self) -> RankError | None:
        """Why there must be no further update; None where nothing is known against one."""
        return None if self._said is None else RankError(self._said)

    def failed(self, update: int, how: str) -> None:
        """The step of an update failed on one process at least, and may have been made on others."""
        self._said = (
            f"Update {update} has been made on some processes and not on others, so their parameters or learning rates "
            f"may differ: {how}. Gradients of different models do not add up, and no state is that of all of them. On "
            "every process load what was saved last, checkpoint.load(), or end the run."
        )

    def forget(self) -> None:
        """The update has failed alike on all processes, or a state of all of them has been loaded."""
        self._said = None
