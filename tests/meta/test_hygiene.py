"""The fixtures of tests/conftest.py, on a made-up test file: what must fail does, and what is put back is."""

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

MADE_UP = """
import os, threading, warnings
import pytest
import torch

@pytest.mark.parametrize("name", ["a", "b"])
def test_same_numbers_each_time(name):
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()

def test_changes_dtype_and_threads():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)

def test_finds_them_put_back():
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1

def test_thread_that_ends():
    threading.Thread(target=threading.Event().wait, args=(0.1,)).start()

@pytest.mark.gpu
def test_on_gpu():
    assert torch.cuda.is_available()

def test_leaks_a_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_leaks_grad_mode():
    torch.set_grad_enabled(False)

def test_leaks_environment():
    os.environ["FORGOTTEN"] = "1"

def test_leaks_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

def test_warns():
    warnings.warn("a warning")
"""


def test_each_leak_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = gpu\nfilterwarnings = error\n")
    pytester.makepyfile(MADE_UP)

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-rs")

    outcomes = result.parseoutcomes()
    skipped = outcomes.get("skipped", 0)
    assert outcomes["errors"] == 4, "each leak is an error of its own test"
    assert outcomes["failed"] == 1, "a warning is an error"
    assert outcomes["passed"] + skipped == 5 + 1 + 4, "all else passes, the leaking tests' own bodies too"
    result.stdout.fnmatch_lines_random(
        [
            "*left behind by this test: thread 'forgotten' still runs",
            "*left behind by this test: grad mode is False, was True",
            "*left behind by this test: environment variable FORGOTTEN was changed",
            "*left behind by this test: the process group was not destroyed",
        ]
    )
    if skipped:
        result.stdout.fnmatch_lines(["SKIPPED*needs a CUDA device"])
