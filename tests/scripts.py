"""The scripts of benchmarks/ as modules: they and their helpers are gone from `sys.modules` afterwards."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


@contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """Imports one script, as running it would, without running it."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for module in set(sys.modules) - before:
            file = getattr(sys.modules[module], "__file__", None)
            if file is not None and Path(file).parent == FOLDER:
                del sys.modules[module]
