"""Loops in processes of their own: each stays in its one, and what goes wrong there is told here."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest


def writes_who(path: Path) -> Callable[[], Callable[[], object]]:
    """Makes a loop that writes the number of its process."""
    return partial(partial, os.system, f"echo $PPID >> '{path}'")


def test_each_loop_has_a_process_of_its_own(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "who"
    with script.apart({name: writes_who(path) for name in "ab"}) as runs:
        for name in "abba":
            wall, processor = runs[name]()
            assert wall > 0
            assert processor >= 0
    who = path.read_text(encoding="utf-8").split()
    assert who[0] == who[3] != who[1] == who[2]
    assert str(os.getpid()) not in who


def test_loops_together_are_in_this_one(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "who"
    with script.together({name: writes_who(path) for name in "ab"}) as runs:
        for run in runs.values():
            run()
    assert path.read_text(encoding="utf-8").split() == [str(os.getpid())] * 2


def test_what_goes_wrong_there_is_told(script: ModuleType) -> None:
    with script.apart({"a": partial(int, "no number"), "b": partial(partial, os._exit, 3)}) as runs:
        with pytest.raises(RuntimeError, match=r"(?s)'a' failed.*ValueError.*no number"):
            runs["a"]()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the process of 'b' has ended"):
                runs["b"]()
