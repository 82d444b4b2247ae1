"""Pages as Chromium lays them out, at the width of a phone and of a desktop, light and dark."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from browser import CHROMIUM, DESKTOP, PHONE, measured
from gradaccum.cli import conformance
from gradaccum.cli.audit import run_audit
from gradaccum.cli.page import as_html
from gradaccum.cli.plan import run_plan
from gradaccum.conformance import scenario, suite, verdicts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: no page can be looked at")

LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA
LEAST_FONT = 12.0  # CSS pixels
SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
import gradaccum as ga

class ANormalisationLayerWithAVeryLongName(nn.BatchNorm1d):
    pass

def loss_fn(model, micro_batch):
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

def batch(rows):
    labels = torch.randint(0, 10, (rows,))
    return torch.randn(rows, 8), labels.masked_fill(torch.arange(rows) < rows // 3, -100)

def culprits():
    model = nn.Sequential(nn.Linear(8, 16))
    model.add_module("normalisation_of_the_hidden_representation", ANormalisationLayerWithAVeryLongName(16))
    model.add_module("2", nn.BatchNorm1d(16))
    model.add_module("head", nn.Linear(16, 10))
    return ga.Job(model, loss_fn, batch(14), micro_batch_size=4)

def exact():
    x = torch.randn(14, 8), torch.randint(0, 10, (14,))
    return ga.Job(nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 10)), loss_fn, x)

def plan():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
    return ga.Job(model, loss_fn, batch(32), torch.optim.AdamW(model.parameters()), 16)

def ways():
    blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 500, 10))
    x = torch.randn(4, 500, 32), torch.randint(0, 10, (4,))
    return ga.Job(model, loss_fn, x, torch.optim.SGD(model.parameters(), lr=0.1))
"""
PAGES = ("culprits", "exact", "plan", "ways", "nothing_fits", "conformance")
FRAMES = tuple(
    f"{page} {width} {scheme}" for page, width, scheme in itertools.product(PAGES, (PHONE, DESKTOP), ("light", "dark"))
)
BROKEN = {
    "no wrapping": ("overflow-wrap: anywhere", ""),
    "no scrolling": ("overflow-x: auto", ""),
    "broken numbers": (".figure { white-space: nowrap; }", ""),
    "broken heads": (
        "grid-template-columns: 4.75rem 1fr; } .headed b {",
        "grid-template-columns: 3rem 1fr; } .headed b { overflow-wrap: anywhere !important;",
    ),
    "pale": ("--quiet: #59636e", "--quiet: #8b949e"),
    "no dark": ("prefers-color-scheme: dark", "prefers-color-scheme: dusk"),
    "no head": ('<th scope="col">gradient</th>', '<th scope="col"></th>'),
    "not held": ("position: sticky", ""),
}
"""A page with one thing spoilt, to see that it is seen."""


def of_conformance() -> str:
    """Two real rows of one trainer, in as many columns as a survey has."""
    textbook = verdicts.known("textbook")
    names = [verdicts.KNOWN[name].title for name in verdicts.KNOWN][:7]
    trainers = [dataclasses.replace(textbook, title=name) for name in names]
    longest = max(suite.scenarios(), key=lambda one: len(one.name))
    rows = [verdicts.judge(one, textbook) for one in (scenario("short last window"), longest)]
    found = [dataclasses.replace(row, trainer=name) for row in rows for name in names]
    return as_html(conformance._page(trainers, found, is_one=False, has_file=True))


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("a_folder_with_a_name_that_is_too_long_for_a_phone")
    source, page = folder / "training.py", folder / "page.html"
    source.write_text(SOURCE, encoding="utf-8")
    pages: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name in ("culprits", "exact"):
            run_audit(f"{source}:{name}", micro_batch_size=None, html=page)
            pages[name] = page.read_text(encoding="utf-8")
        patch.setattr("gradaccum.fit.probe._SECONDS_PER_SIZE", 0.0)
        for name, job, memory in (
            ("plan", "plan", "1GiB"),
            ("ways", "ways", "5MiB"),
            ("nothing_fits", "plan", "1KiB"),
        ):
            run_plan(f"{source}:{job}", memory=memory, estimate=name != "plan", device=None, html=page)
            pages[name] = page.read_text(encoding="utf-8")
    pages["conformance"] = of_conformance()
    for name, (old, new) in BROKEN.items():
        base = pages["conformance" if name in ("not held", "no scrolling") else "culprits"]
        assert old in base, name
        pages[name] = base.replace(old, new)
    return measured(pages, folder)


def complaints(frame: str, seen: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a frame."""
    if seen["document"] > seen["width"]:
        yield f"the page is {seen['document']} px wide"
    if seen["outside"]:
        yield f"outside of the window: {seen['outside'][:5]}"
    if seen["broken"]:
        yield f"words on two lines: {seen['broken'][:5]}"
    if seen["contrast"] < LEAST_CONTRAST:
        yield f"contrast {seen['contrast']:.2f} of {seen['palest']}"
    if (seen["ground"] < 0.5) is not frame.endswith(" dark"):
        yield f"a ground of luminance {seen['ground']:.2f}"
    if seen["smallest"] < LEAST_FONT:
        yield f"letters of {seen['smallest']} px"
    if seen["code"]:
        yield f"code in another font: {seen['code'][:5]}"
    for table in seen["tables"]:
        if not all(table["heads"]) or table["cells"] != [len(table["heads"])]:
            yield f"columns {table['heads']} over {table['cells']} cells"
        left, right = table["label"]
        if left < 0 or right > seen["width"] / 2:
            yield f"labels at {left} to {right} px once the table is scrolled"
        if table["last"][1] > seen["width"]:
            yield f"the last column ends at {table['last'][1]} px"


@pytest.mark.parametrize("frame", FRAMES)
def test_it_reads_well(looked_at: dict[str, dict[str, Any]], frame: str) -> None:
    assert list(complaints(frame, looked_at[frame])) == []


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (f"no wrapping {PHONE} light", "the page is"),
        (f"no scrolling {PHONE} light", "the page is"),
        (f"broken numbers {PHONE} light", "words on two lines: ['<td>"),
        (f"broken heads {DESKTOP} light", "words on two lines: ['<b> Where:"),
        (f"pale {DESKTOP} light", "contrast 3"),
        (f"no dark {DESKTOP} dark", "a ground of"),
        (f"no head {DESKTOP} light", "columns ['', 'parameters'"),
        (f"not held {PHONE} dark", "labels at -"),
    ],
)
def test_what_is_spoilt_is_seen(looked_at: dict[str, dict[str, Any]], frame: str, complaint: str) -> None:
    assert any(complaint in one for one in complaints(frame, looked_at[frame])), looked_at[frame]


def test_only_a_wide_table_is_scrolled(looked_at: dict[str, dict[str, Any]]) -> None:
    wide = {frame for frame in FRAMES for table in looked_at[frame]["tables"] if table["wide"]}
    assert {frame.split()[0] for frame in wide if f" {PHONE} " in frame} <= {
        "plan",
        "ways",
        "nothing_fits",
        "conformance",
    }
    assert not [frame for frame in wide if f" {DESKTOP} " in frame]
