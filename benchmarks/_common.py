"""What every benchmark does alike: say on which machine and with what versions it ran, and write that down."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "accelerate", "lightning", "transformers", "pytorch-ignite", "sentence-transformers")


def machine() -> dict[str, Any]:
    """The hardware that a measurement depends on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Python, this library, and whichever of `PACKAGES` are installed."""
    import gradaccum

    found = {"python": platform.python_version(), "gradaccum": gradaccum.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """What to type in the repository to get these results again."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(FOLDER.parent) if script.is_relative_to(FOLDER.parent) else Path(script.name)
    return shlex.join(["python", shown.as_posix(), *sys.argv[1:]])


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes JSON: the results under their own names, after the command, the machine and the versions."""
    everything = {"command": command(), "machine": machine(), "versions": versions(), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
