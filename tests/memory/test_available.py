"""What is left of the host's memory, whoever limits it."""

from pathlib import Path

import pytest
import torch

from gradaccum.memory import available
from gradaccum.memory.available import available_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_the_least_of_the_limits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_bytes(CPU)
    assert free is not None
    assert free > 1 << 20
    monkeypatch.setattr(available, "_left_of_control_group", lambda: iter([12345]))
    assert available_bytes(CPU) == 12345


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_a_capped_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 50, 1 << 50))
    (left,) = available._left_of_address_space()
    assert 0 < (1 << 50) - left < 1 << 40, "what is mapped already is not left"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 1))
    assert list(available._left_of_address_space()) == [0]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert list(available._left_of_address_space()) == []


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "400\n"}, [600]),
        ({"memory.max": "1000", "memory.current": "4000"}, [0]),
        ({"memory.max": "max\n", "memory.current": "400\n"}, []),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "1"}, [999]),
        ({}, []),
        ({"memory.max": "much", "memory.current": "400"}, []),
    ],
    ids=["version 2", "over", "no limit", "version 1", "none", "unreadable"],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], left: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert list(available._left_of_control_group(tmp_path)) == left


def test_of_a_device_that_tells_nothing() -> None:
    assert available_bytes(torch.device("meta")) is None
