"""The progress bar, which counts updates."""

from __future__ import annotations

import logging
from typing import Any

from gradaccum.errors import MissingExtraError
from gradaccum.types import Update
from gradaccum.window.option_names import check_flag

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} updates [{elapsed}<{remaining}{postfix}]"
_BAR_WITHOUT_END = "{desc}{n:.1f} updates [{elapsed}{postfix}]"


def tqdm_of_notebooks_too() -> Any:
    """The class that draws, or an error where there is none."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingExtraError(
            "progress=True draws with tqdm, which is not installed. Type: pip install tqdm (the extra 'progress' of "
            "this package), or leave progress out."
        ) from error
    return tqdm


class ProgressBar:
    """A tqdm bar in updates that also moves inside a window.

    Args:
        total: number of updates; None where unknown.
        description: stands before the bar.

    Raises:
        MissingExtraError: tqdm is not installed.
    """

    def __init__(self, *, total: int | None, description: str = "") -> None:
        tqdm = tqdm_of_notebooks_too()
        logging.getLogger(__name__).debug("progress bar over %s updates", total)
        self._bar: Any = tqdm(
            total=total, desc=description or None, bar_format=_BAR if total is not None else _BAR_WITHOUT_END
        )
        self._updates = 0

    def inside(self, done: int, expected: int) -> None:
        """``done`` of ``expected`` micro-batches of the window have run."""
        self._move(self._updates + min(done / max(expected, done, 1), 0.99))

    def updated(self, update: Update) -> None:
        """A window closed."""
        self._updates += 1
        if self._is_due():
            # Reading the loss waits for the device, so it is done at the bar's own pace, not for every update.
            self._bar.set_postfix(loss=f"{float(update.loss):.4g}", refresh=False)
        self._move(self._updates)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.refresh()
        self._bar.close()

    def _move(self, position: float) -> None:
        self._bar.update(position - self._bar.n)

    def _is_due(self) -> bool:
        bar = self._bar
        if bar.disable:
            return False
        is_last = bar.total is not None and self._updates >= bar.total
        return is_last or bool(bar._time() - bar.last_print_t >= bar.mininterval)


class PassBar:
    """The bar of one pass after another, if one is wanted, and shown by this of several processes."""

    def __init__(self, *, is_wanted: bool, is_shown: bool = True) -> None:
        check_flag("progress", is_wanted)
        self._is_wanted = is_wanted and is_shown
        if is_wanted:
            tqdm_of_notebooks_too()  # said now, and not when the first pass begins
        self._bar: ProgressBar | None = None

    @property
    def is_due(self) -> bool:
        """Whether a bar is wanted, and this pass has none yet."""
        return self._is_wanted and self._bar is None

    def begin(self, *, total: int | None) -> None:
        """Draws the bar of a pass of so many updates."""
        self._bar = ProgressBar(total=total)

    def inside(self, done: int, expected: int) -> None:
        """See `ProgressBar`."""
        if self._bar is not None:
            self._bar.inside(done, expected)

    def updated(self, update: Update) -> None:
        """See `ProgressBar`."""
        if self._bar is not None:
            self._bar.updated(update)

    def close(self) -> None:
        """Leaves the pass's bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
