from dataclasses import replace

import pytest

from gradaccum.cli.demo import words
from gradaccum.cli.demo.comparison import Comparison, compare
from gradaccum.cli.demo.regression import regression_task
from gradaccum.report.tables import Tone


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(regression_task(97, title="97 samples", text="Few."))


def wrong(comparison: Comparison) -> Comparison:
    return replace(comparison, library=comparison.textbook)


def test_the_table(comparison: Comparison) -> None:
    table = words.table(comparison)
    rows = {row.label: [cell.text for cell in row.cells] for row in table.rows}
    assert rows["batch"] == ["40", "10 x 4", "10 x 4"]
    assert {"loss, epoch 1", "loss, epoch 3", "difference of weights", "difference of gradients"} <= rows.keys()
    assert rows["verdict"] == ["-", "drifts", "exact"]
    assert all(len(cells) == len(table.columns) for cells in rows.values())
    assert float(rows["difference of weights"][1]) > 100 * float(rows["difference of weights"][2])


def test_the_verdict_of_a_row_has_its_tone(comparison: Comparison) -> None:
    assert [cell.tone for cell in words.table(comparison).rows[-1].cells] == [Tone.QUIET, Tone.BAD, Tone.GOOD]
    assert words.table(wrong(comparison)).rows[-1].cells[-1].text == "NOT EXACT"
    assert words.table(wrong(comparison)).rows[-1].cells[-1].tone is Tone.BAD


def test_the_verdict_over_all(comparison: Comparison) -> None:
    is_exact, text = words.verdict([comparison])
    assert is_exact
    assert text.startswith("EXACT: every update is the whole batch's. The textbook loop is up to ")
    is_exact, text = words.verdict([comparison, wrong(comparison)])
    assert not is_exact
    assert text.startswith("NOT EXACT. 97 samples: off by ")


def test_a_row_of_losses_and_a_row_of_distances(comparison: Comparison) -> None:
    losses, distances = words.panels([comparison, comparison])
    assert [panel.title for panel in losses] == ["97 samples", "97 samples"]
    assert [panel.is_logarithmic for panel in losses + distances] == [False, False, True, True]
    assert [series.label for series in distances[0].series] == [
        "whole batch", "textbook loop", "gradaccum", "gradaccum in float64",
    ]  # fmt: skip
    assert all(len(series.values) == 9 for panel in losses + distances for series in panel.series)
