"""What a plan says to a person: the table, the advice, the picture."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gradaccum as ga
from gradaccum.fit.plan_result import Breakdown, Plan, Row
from gradaccum.fit.size_model import Curve

GIB = 2**30


def made(
    *, memory: int | None = 24 * GIB, times: bool = True, resident: int = 8 * GIB, step: int = 0, **options: Any
) -> Plan:
    """A batch of 64 that takes 8 GiB and 1 GiB a sample; the fastest size is 4."""
    curve = Curve.through(
        {1: resident + GIB, 32: resident + 32 * GIB}, whole=(64, resident + 60 * GIB), floor=resident + step
    )
    rates = {1: 10.0, 4: 40.0, 16: 30.0, 64: 20.0}
    rows: list[Row] = []
    for size, rate in rates.items():
        fits = memory is None or curve.at(size) <= memory
        rows.append(
            Row(
                micro_batch_size=size, micro_batches=64 // size, peak_bytes=curve.at(size), is_measured=times and fits,
                seconds=size / rate if times and fits else None, samples_per_second=rate if times and fits else None,
                fits=fits, updates_per_epoch=options.get("updates_per_epoch"),
            )
        )  # fmt: skip
    fitting = [row for row in rows if row.fits]
    chosen = max(fitting, key=lambda row: (row.samples_per_second or 0, row.micro_batch_size), default=None)
    return Plan(
        method="measure" if times else "estimate", device="cpu", batch_size=64, memory=memory,
        micro_batch_size=None if chosen is None else chosen.micro_batch_size,
        largest_micro_batch_size=64 if memory is None else curve.largest(memory, 64), rows=tuple(rows),
        breakdown=Breakdown(
            parameters=resident // 4, buffers=0, gradients=resident // 4, optimizer_state=resident // 2,
            optimizer_step=step, activations_per_sample=GIB, temporaries=0,
        ),
        notes=options.get("notes", ()), _curve=curve,
    )  # fmt: skip


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
}  # fmt: skip


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


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = made().plot(str(tmp_path / f"plan{suffix}"))
    assert path == tmp_path / f"plan{suffix}"
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("plan", [made(times=False), made(memory=None), made(memory=2**60), made(memory=GIB)])
def test_pictures_of_other_plans(plan: Plan, tmp_path: Path) -> None:
    assert plan.plot(tmp_path / "plan.png").stat().st_size > 5_000


def test_the_picture_has_the_budget(tmp_path: Path) -> None:
    assert "budget 24 GiB" in made().plot(tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "budget" not in made(memory=None).plot(tmp_path / "b.svg").read_text(encoding="utf-8").split("no budget")[-1]


def test_no_display_and_no_state(tmp_path: Path) -> None:
    made().plot(tmp_path / "a.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ga.MissingExtraError, match=r"A picture needs 'matplotlib'.*pip install 'gradaccum\[plot\]'"):
        made().plot(tmp_path / "a.png")
