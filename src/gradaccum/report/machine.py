"""With what, and on what, a result was made: versions and the machine, for footers and files of figures."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from datetime import datetime, timezone

import torch


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, torch, gradaccum, and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "gradaccum", *packages):
        if importlib.util.find_spec(package) is not None:
            found[package] = _version(package)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def machine() -> dict[str, str | int | None]:
    """Processor, cores, torch's threads, system, and the accelerator where torch finds one."""
    found: dict[str, str | int | None] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | ({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def footer() -> list[str]:
    """Lines for the end of a page: versions; the machine; the date, in UTC."""
    own = machine()
    parts = [f"{own['system']}", f"{own['cores']} cores", f"{own['torch_threads']} threads of torch"]
    parts += [f"{own['accelerator']}"] if "accelerator" in own else []
    return [
        f"Made with {', '.join(f'{name} {version}' for name, version in versions().items())}.",
        f"Machine: {', '.join(parts)}.",
        f"Date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.",
    ]
