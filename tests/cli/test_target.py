"""From what is typed to a job."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradaccum as ga
from gradaccum.cli.target import TargetError, load_job

SOURCE = """
import torch
from torch import nn
import gradaccum as ga

def job(rows=4):
    return ga.Job(nn.Linear(2, 1), lambda model, x: model(x).mean(), torch.zeros(rows, 2))

def number():
    return 3

def needs(rows):
    return job(rows)

def broken():
    raise LookupError("in the user's function")

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def _imports_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if getattr(sys.modules[name], "__file__", None) and "pytest" in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_package").mkdir()
    files = {"my_training.py": SOURCE, "my_package/__init__.py": "", "my_package/jobs.py": SOURCE}
    files |= {"my_package/beside.py": "from jobs import job\n", "my_broken.py": "import nobody_has_this\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = ["my_training.py:job", "{folder}/my_training.py:job", "my_package/jobs.py:job", "my_package/beside.py:job"]


@pytest.mark.parametrize("target", [*FILES, "my_training:job", "my_package.jobs:job"])
def test_targets(target: str, folder: Path) -> None:
    job = load_job(target.format(folder=folder))
    assert isinstance(job, ga.Job)
    assert len(job.batch) == 4


def test_a_file_does_not_replace_a_module_of_the_same_name(folder: Path) -> None:
    import json

    (folder / "json.py").write_text(SOURCE, encoding="utf-8")
    load_job("json.py:job")
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_training.py", r"'my_training.py' does not name a function\. Write path/to/file.py:function"),
        (":job", "does not name a function"),
        ("my_training.py:", "does not name a function"),
        ("my_training.py:a b", "does not name a function"),
        ("gone.py:job", r"There is no file .*gone\.py"),
        ("gone:job", r"There is no module 'gone'.*gone\.py:function"),
        ("my_package.gone:job", r"There is no module 'my_package\.gone'.*my_package/gone\.py:function"),
        ("my_training.py:gone", r"has no function 'gone'\. It has broken, job, needs, number\."),
        ("my_training.py:not_a_function", "has no function 'not_a_function'"),
        ("my_training.py:number", r"returned int, and has to return a job: ga\.Job"),
        ("my_training.py:needs", r"cannot be called without arguments \(missing a required argument: 'rows'\)"),
    ],
)
def test_what_leads_nowhere(target: str, message: str, folder: Path) -> None:
    with pytest.raises(TargetError, match=message):
        load_job(target)


@pytest.mark.parametrize("target", ["my_training.py:broken", "my_broken.py:job", "my_broken:job"])
def test_what_the_users_code_raises_passes_through(target: str, folder: Path) -> None:
    with pytest.raises(LookupError if "training" in target else ModuleNotFoundError):
        load_job(target)
    assert "my_broken" not in sys.modules
