"""What a person reads: within 80 columns, the answer first, like culprits together."""

from dataclasses import replace

import pytest

import gradaccum as ga
from gradaccum.auditing import audit_report, culprits
from gradaccum.checking.compare import ParameterVerdict

EXACT = ga.Report(
    exact=True,
    relative_error=1e-16,
    tolerance=1e-10,
    culprits=(),
    samples=13,
    micro_batch_sizes=(5, 4, 4),
    parameters=(ParameterVerdict(name="weight", verdict="rounding", error=1e-16),),
    equal_sizes_error=1e-16,
    dtype="float64",
    own_dtype="float32",
)
NORMS = tuple(culprits.BATCH_NORM.found(0.1 * (9 - i), f"layers.{i}.norm", options="") for i in range(8))

IMPRECISE = culprits.PRECISION.found(0.02, dtype="bfloat16", accumulated="2%", whole="0.3%")


def with_culprits(*culprits: ga.Culprit, error: float = 0.5) -> ga.Report:
    return replace(EXACT, exact=False, relative_error=error, equal_sizes_error=error, culprits=culprits)


def test_exact() -> None:
    assert str(EXACT).splitlines() == [
        "Exact: the accumulated gradient is the whole batch's, to 1.0e-16.",
        "",
        "13 samples at once, against micro-batches of 5, 4, 4 (uneven, since equal ones",
        "hide errors); in float64.",
        "",
        "gradient  parameters  worst error  ratio  the worst of them",
        "rounding           1      1.0e-16      1  weight",
    ]


def test_of_equal_sizes_nothing_is_said() -> None:
    assert "of 5, 5; in float64." in str(replace(EXACT, micro_batch_sizes=(5, 5)))


def test_like_culprits_stand_together() -> None:
    text = str(with_culprits(*NORMS))
    assert text.count("Why:") == 1
    assert "1. batch-norm: 90% by itself, the worst of them" in text
    assert "layers.4.norm" in text
    assert "layers.5.norm" not in text
    assert "and 3 more" in text
    assert max(map(len, text.splitlines())) <= 80


SAID = {
    "off": (with_culprits(NORMS[0]), "Not exact: the accumulated gradient is off by 50% of the whole batch's."),
    "all of it": (with_culprits(NORMS[0], error=float("inf")), "off by all of it"),
    "state": (
        with_culprits(culprits.BUFFER.found(0.1, "norm", buffers="running_mean", effect="", remedy=""), error=0.0),
        "the gradient is the whole batch's, but what the update leaves in the model is not",
    ),
    "precision": (
        replace(with_culprits(IMPRECISE, error=0.0), own_dtype="bfloat16"),
        "Exact in float64, and not in bfloat16",
    ),
}


@pytest.mark.parametrize(("report", "said"), SAID.values(), ids=SAID.keys())
def test_the_answer(report: ga.Report, said: str) -> None:
    assert said in audit_report.answer(report)


def test_ratios_are_named() -> None:
    scaled = ParameterVerdict(name="weight", verdict="scaled", error=2.0, ratio=3.0)
    report = replace(with_culprits(NORMS[0]), parameters=(scaled, replace(scaled, name="bias")))
    assert "3.000, the number of micro-batches" in str(report)
    report = replace(report, parameters=(replace(scaled, ratio=1 / 3),))
    assert "0.333, 1 / the number of micro-batches" in str(report)
    report = replace(report, parameters=(replace(scaled, ratio=1 / 13), replace(scaled, ratio=0.5)))
    assert "0.0769 to 0.5" in str(report)


def test_many_micro_batches_are_cut_short() -> None:
    report = replace(EXACT, micro_batch_sizes=(1,) * 100, samples=100)
    assert "1, 1, 1, 1, 1, 1, 1, 1, ... (100 in all); in float64." in audit_report.setting(report)
