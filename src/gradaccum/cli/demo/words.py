"""A comparison as a table, as curves, and as a verdict."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradaccum.cli.demo.comparison import Comparison, distances, largest_difference
from gradaccum.cli.demo.run import Run
from gradaccum.report.plots import Mark, Panel, Series
from gradaccum.report.tables import Cell, Row, Table, Tone

LEGEND = (
    "Difference: from the whole batch's column, the largest at any update. Distance: of the trained weights from those "
    "of the whole batch in float64, relative. The whole batch's own is what rounding to float32 costs."
)

_NONE = Cell(text="-", tone=Tone.QUIET)


def table(comparison: Comparison) -> Table:
    """Losses to ten digits, and how far each way is from the whole batch."""
    task = comparison.task
    accumulated = Cell(text=f"{task.micro_batch_size} x {task.micro_batches}")
    whole, textbook, library = comparison.whole, comparison.textbook, comparison.library
    return Table(
        title=task.title,
        text=task.text,
        columns=("whole batch", "textbook loop", "gradaccum"),
        rows=(
            Row(label="batch", cells=(Cell(text=str(task.batch_size)), accumulated, accumulated), ends_section=True),
            *_loss_rows(comparison),
            Row(
                label="difference of weights",
                cells=(_NONE, *(_difference(run.parameters, whole.parameters) for run in (textbook, library))),
            ),
            Row(
                label="difference of gradients",
                cells=(_NONE, *(_difference(run.gradients, whole.gradients) for run in (textbook, library))),
                ends_section=True,
            ),
            Row(
                label="distance in float32",
                cells=tuple(Cell(text=f"{_off(run, comparison):.1e}") for run in (whole, textbook, library)),
            ),
            Row(
                label="distance in float64",
                cells=(_NONE, _NONE, Cell(text=f"{_off(comparison.library_in_float64, comparison):.1e}")),
            ),
            Row(
                label="verdict",
                cells=(
                    _NONE,
                    _judged("same", "drifts", good=comparison.is_within_rounding(textbook)),
                    _judged("exact", "NOT EXACT", good=comparison.is_exact),
                ),
            ),
        ),
    )


def verdict(comparisons: Sequence[Comparison]) -> tuple[bool, str]:
    """Whether the library was exact on every task, and a sentence that says so."""
    wrong = [comparison for comparison in comparisons if not comparison.is_exact]
    if wrong:
        where = "; ".join(
            f"{comparison.task.title}: off by {_off(comparison.library, comparison):.0e} in float32, "
            f"{_off(comparison.library_in_float64, comparison):.0e} in float64"
            for comparison in wrong
        )
        return False, f"NOT EXACT. {where}."
    worst = max(_off(comparison.textbook, comparison) for comparison in comparisons)
    return True, f"EXACT: every update is the whole batch's. The textbook loop is up to {worst:.1%} off."


def panels(comparisons: Sequence[Comparison]) -> list[list[Panel]]:
    """A row of loss curves above a row of distances, a column for each task."""
    return [[_loss_panel(comparison) for comparison in comparisons], [_distance_panel(c) for c in comparisons]]


def _loss_rows(comparison: Comparison) -> list[Row]:
    runs = (comparison.whole, comparison.textbook, comparison.library)
    losses = [run.epoch_losses(comparison.task.updates_per_epoch) for run in runs]
    epochs = comparison.task.epochs
    return [
        Row(
            label=f"loss, epoch {epoch + 1}",
            cells=tuple(Cell(text=f"{loss[epoch]:.10f}") for loss in losses),
            ends_section=epoch + 1 == epochs,
        )
        for epoch in range(epochs)
    ]


def _difference(values: Tensor, others: Tensor) -> Cell:
    return Cell(text=f"{largest_difference(values, others):.1e}")


def _judged(yes: str, no: str, *, good: bool) -> Cell:
    return Cell(text=yes if good else no, tone=Tone.GOOD if good else Tone.BAD)


def _off(run: Run, comparison: Comparison) -> float:
    """Distance of the trained weights from the measure."""
    return float(distances(run.parameters, comparison.exact.parameters)[-1])


def _loss_panel(comparison: Comparison) -> Panel:
    return Panel(
        title=comparison.task.title,
        subtitle=(
            f"off by {_off(comparison.textbook, comparison):.0e} (textbook loop), "
            f"{_off(comparison.library, comparison):.0e} (gradaccum)"
        ),
        series=(
            _series("whole batch", Mark.REFERENCE, comparison.whole.losses),
            _series("textbook loop", Mark.BAD, comparison.textbook.losses),
            _series("gradaccum", Mark.GOOD, comparison.library.losses),
        ),
        y_label=f"loss (mean over {comparison.task.unit})",
    )


def _distance_panel(comparison: Comparison) -> Panel:
    exact = comparison.exact.parameters
    return Panel(
        series=(
            _series("whole batch", Mark.REFERENCE, distances(comparison.whole.parameters, exact)),
            _series("textbook loop", Mark.BAD, distances(comparison.textbook.parameters, exact)),
            _series("gradaccum", Mark.GOOD, distances(comparison.library.parameters, exact)),
            _series("gradaccum in float64", Mark.BEST, distances(comparison.library_in_float64.parameters, exact)),
        ),
        x_label="update",
        y_label="distance of the weights from\nthe whole batch in float64",
        is_logarithmic=True,
    )


def _series(label: str, mark: Mark, values: Tensor) -> Series:
    return Series(label=label, mark=mark, values=tuple(values.tolist()))
