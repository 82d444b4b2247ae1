import platform

import pytest
import torch

import gradaccum as ga
from gradaccum.report.machine import footer, machine, versions


def test_versions_are_those_that_run() -> None:
    found = versions("jinja2", "nobody_has_this")
    assert list(found) == ["python", "torch", "gradaccum", "jinja2"]
    assert (found["python"], found["gradaccum"]) == (platform.python_version(), ga.__version__)


def test_an_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A device")
    assert machine()["accelerator"] == "A device"
    assert any("A device" in line for line in footer())


def test_the_footer_of_this_machine() -> None:
    made_with, machine_line, date = footer()
    assert f"gradaccum {ga.__version__}" in made_with
    assert f"{torch.get_num_threads()} threads of torch" in machine_line
    assert date.startswith("Date: 2")
