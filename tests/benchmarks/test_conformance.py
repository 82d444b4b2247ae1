"""The table of docs/conformance.md is the one on file, of the scenarios and trainers that there are."""

import json
from types import ModuleType

from gradaccum.conformance import scenarios
from gradaccum.conformance.verdicts import KNOWN
from scripts import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "conformance.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_results_on_file(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.partition(script.START)[2].partition(script.END)[0] == script.markdown(
        RESULTS["verdicts"], RESULTS["versions"]
    )


def test_the_results_are_of_all_there_is() -> None:
    verdicts = RESULTS["verdicts"]
    assert list(dict.fromkeys(one["scenario"] for one in verdicts)) == [case.name for case in scenarios()]
    assert {one["trainer"] for one in verdicts} == {one.title for one in KNOWN.values()}
    assert {"torch", "accelerate", "lightning", "transformers", "gradaccum"} <= RESULTS["versions"].keys()


def test_what_is_off_has_its_reason_and_five_lines() -> None:
    for one in RESULTS["verdicts"]:
        assert (len(one["reproduction"]) == 5) == (one["outcome"] in ("off", "error")), one
        assert one["reason"] or one["outcome"] == "exact", one
        assert one["outcome"] == "exact" or one["trainer"] not in ("Accumulator", "TrainStep") or one["error"] is None


def test_writing_the_page(script: ModuleType, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.START}old\n{script.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    script.write_page("new\n")
    assert page.read_text(encoding="utf-8") == f"before\n{script.START}new\n{script.END}\nafter\n"
