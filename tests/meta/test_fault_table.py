"""The table of docs/processes.md, what happens when one process fails: each row has a test, and each test a row."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "processes.md").read_text(encoding="utf-8")
HEADING = "| what happens on one process | the others | on disk, and afterwards |"

# By the first words of a row: the functions that make it happen and look at all of its columns, as file::function.
TESTED = {
    "its loss function, `weights=` or loader raises": (
        "sync/test_faults.py::one_raises",
        "sync/test_faults.py::one_raises_before_its_first_window",
        "sync/test_other_places.py::a_loader_fails",
        "sync/test_injected_faults.py::test_all_end_or_go_on_together",
    ),
    "its optimizer, scheduler or `before_step` raises": (
        "sync/test_other_places.py::a_step_fails",
        "sync/test_injected_faults.py::test_all_end_or_go_on_together",
    ),
    "it runs out of memory": ("sync/test_faults.py::one_runs_out_of_memory",),
    "one sample does not fit": ("sync/test_faults.py::one_runs_out_of_memory",),
    "`if rank == 0: checkpoint.save()`": ("sync/test_other_places.py::saves_alone",),
    "`train_step.backward` on one": (
        "sync/test_other_places.py::looks_at_a_gradient_alone",
        "sync/test_other_places.py::another_order_of_models",
    ),
    "a `break`, or an error that was caught": ("sync/test_other_places.py::leaves_its_pass_alone",),
    "it has fewer batches": ("sync/test_other_places.py::test_one_has_fewer_batches",),
    "its loop's body raises": (
        "sync/test_other_places.py::test_one_has_fewer_batches",
        "sync/test_injected_faults.py::test_all_end_or_go_on_together",
    ),
    "it is killed": (
        "sync/test_faults.py::test_one_is_killed",
        "checkpoint/test_checkpoint.py::test_killed_twenty_times",
    ),
    "it does something else": ("sync/test_other_places.py::test_the_time_limit_of_messages",),
    "it raises inside of FSDP2": ("sync/test_faults.py::test_one_raises_among_shards",),
    "it cannot save": ("checkpoint/test_saves_that_fail.py::test_all_hear_of_it_and_go_on",),
    "it gets the signal": ("checkpoint/test_stops.py::test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been",),
}


def first_cells(page: str) -> list[str]:
    """What stands in the first column of the table."""
    table = page.partition(f"{HEADING}\n")[2].partition("\n\n")[0]
    return [re.split(r"\s\|\s", row.removeprefix("| "))[0] for row in table.splitlines()[1:]]


def without(rows: list[str]) -> list[str]:
    """Rows that no test is named for, or more than one."""
    return [row for row in rows if sum(row.startswith(words) for words in TESTED) != 1]


def test_each_row_has_a_test() -> None:
    rows = first_cells(PAGE)
    assert len(rows) == len(TESTED) > 10
    assert not without(rows)


def test_a_row_without_a_test_is_found() -> None:
    page = PAGE.replace("| it is killed |", "| it catches fire | burn | ashes |\n| it is killed |")
    assert without(first_cells(page)) == ["it catches fire"]


@pytest.mark.parametrize("name", sorted({name for names in TESTED.values() for name in names}))
def test_each_test_is_there_and_run(name: str) -> None:
    file, _, function = name.partition("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert function in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, f"{file} has no {function}"
    called = {one.func.id for one in ast.walk(tree) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)}
    assert function.startswith("test_") or function in called, f"nothing in {file} calls {function}"
