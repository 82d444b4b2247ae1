"""What a plan says to a person: the table, the advice, the picture."""

import re
from pathlib import Path
from typing import Any

import pytest

from gradaccum.fit.plan_result import Breakdown, Plan, Row
from gradaccum.fit.size_model import Curve

GIB = 2**30


def made(
    *, memory: int | None = 24 * GIB, times: bool = True, resident: int = 8 * GIB, step: int = 0, **options: Any
) -> Plan:
    """A batch of 64 that takes 8 GiB and 1 GiB a sample; the fastest size is 4."""
    whole = (64, resident + 60 * GIB)
    curve = Curve.through({1: resident + GIB, 32: resident + 32 * GIB}, whole=whole, floor=resident + step)
    rows: list[Row] = []
    for size, rate in {1: 10.0, 4: 40.0, 16: 30.0, 64: 20.0}.items():
        fits = memory is None or curve.at(size) <= memory
        row = Row(
            micro_batch_size=size,
            micro_batches=64 // size,
            peak_bytes=curve.at(size),
            is_measured=times and fits,
            seconds=size / rate if times and fits else None,
            samples_per_second=rate if times and fits else None,
            fits=fits,
            updates_per_epoch=options.get("updates_per_epoch"),
        )
        rows.append(row)
    fitting = [row for row in rows if row.fits]
    chosen = max(fitting, key=lambda row: (row.samples_per_second or 0, row.micro_batch_size), default=None)
    quarter = resident // 4
    fixed = {"parameters": quarter, "buffers": 0, "gradients": quarter, "optimizer_state": 2 * quarter}
    return Plan(
        method="measure" if times else "estimate",
        device="cpu",
        batch_size=64,
        memory=memory,
        micro_batch_size=None if chosen is None else chosen.micro_batch_size,
        largest_micro_batch_size=64 if memory is None else curve.largest(memory, 64),
        rows=tuple(rows),
        breakdown=Breakdown(**fixed, optimizer_step=step, activations_per_sample=GIB, temporaries=0),
        notes=options.get("notes", ()),
        _curve=curve,
    )


def test_the_table() -> None:
    plan = made(updates_per_epoch=157, notes=("something to know",))
    assert str(plan) == (
        "A batch of 64 samples, measured on cpu, budget 24 GiB, 157 updates an epoch\n"
        "\n"
        "micro-batch  pieces     peak  fits  seconds  samples/s\n"
        "          1      64    9 GiB   yes      0.1         10\n"
        "          4      16   12 GiB   yes      0.1         40  <\n"
        "         16       4   24 GiB   yes    0.533         30\n"
        "         64       1  ~68 GiB    no        -          -\n"
        "\n"
        "Memory: parameters 2 GiB, gradients 2 GiB, optimizer state 4 GiB; and 1 GiB a\n"
        "sample.\n"
        "\n"
        "micro_batch_size=4 is the fastest that fits: 16 micro-batches an update, 12 GiB\n"
        "of 24 GiB, 40 samples a second. Up to 16 samples fit. In one piece the batch\n"
        "would take 68 GiB.\n"
        "\n"
        "Note: something to know"
    )
    assert max(map(len, str(plan).splitlines())) <= 80


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "fits.md").read_text(encoding="utf-8")
    source, shown = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("python", "text"))
    exec(source, {})
    assert capsys.readouterr().out == shown


ADVICE = {
    "timed": (made(), r"^micro_batch_size=4 is the fastest that fits: 16 micro-batches an update, 12 GiB of 24 GiB, "),
    "not timed": (made(times=False), r"^micro_batch_size=16 is the largest that fits: 4 micro-batches an update, 24 "),
    "not needed": (
        made(memory=80 * GIB),
        r"Accumulation is not needed: the whole batch of 64 fits, with 68 GiB of 80 GiB\. In micro-batches of 4 it is "
        r"2\.00 times as fast all the same, and takes 12 GiB\.$",
    ),
    "not needed, not timed": (made(memory=80 * GIB, times=False), r"whole batch of 64 fits, with 68 GiB of 80 GiB\.$"),
    "no budget": (made(memory=None, times=False), r"^No budget was given .*The whole batch of 64 takes 68 GiB\.$"),
    "resident": (
        made(memory=4 * GIB),
        r"^Accumulation cannot help: parameters, gradients and optimizer state alone take 8 GiB of 4 GiB.*LoRA.*host",
    ),
    "step": (
        made(memory=10 * GIB, step=3 * GIB),
        r"^Accumulation cannot help: the optimizer's step takes 3 GiB besides 8 GiB.*fused=True or foreach=False",
    ),
    "one sample": (
        made(memory=8 * GIB + 5),
        r"^No size that was looked at fits: 1 sample takes 9 GiB of 8 GiB, 8 GiB of it .*checkpointing",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice(name: str) -> None:
    plan, pattern = ADVICE[name]
    assert re.search(pattern, plan.advice)
    assert " ".join(plan.advice.split()) in " ".join(str(plan).split())


@pytest.mark.parametrize(
    ("plan", "whole_fits", "helps"),
    [(made(), False, True), (made(memory=80 * GIB), True, False), (made(memory=GIB), False, False)],
)
def test_whether_to_accumulate(plan: Plan, whole_fits: bool, helps: bool) -> None:
    assert (plan.whole_batch_fits, plan.accumulation_helps) == (whole_fits, helps)


@pytest.mark.parametrize("plan", [made(), made(times=False), made(memory=None), made(memory=2**60), made(memory=GIB)])
def test_pictures(plan: Plan, tmp_path: Path) -> None:
    path = plan.plot(str(tmp_path / "plan.png"))
    assert path == tmp_path / "plan.png"
    assert path.stat().st_size > 5_000


def test_the_picture_has_the_budget(tmp_path: Path) -> None:
    assert "budget 24 GiB" in made().plot(tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "budget" not in made(memory=None).plot(tmp_path / "b.svg").read_text(encoding="utf-8").split("no budget")[-1]
