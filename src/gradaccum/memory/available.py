"""How much of a device's memory this process could still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

USABLE_OF_CUDA = 0.95  # the rest is lost to fragments between blocks


def available_bytes(device: torch.device) -> int | None:
    """What tensors of this process could still take of a device; None where nobody tells.

    On CUDA what is free and what the allocator holds unused, less 5% for fragments, inside the fraction that the
    process may have. On the CPU the least of what the system, the process' limit of address space and its control
    group leave, where there is a ``/proc`` to ask.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cap = round(total * torch.cuda.get_per_process_memory_fraction(device))
        usable = min(free + torch.cuda.memory_reserved(device), cap) - torch.cuda.memory_allocated(device)
        return round(USABLE_OF_CUDA * usable)
    if device.type == "cpu":
        return min(_limits_of_the_host(), default=None)
    return None


def _limits_of_the_host() -> Iterator[int]:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            yield next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):  # not Linux
        return
    yield from _left_of_address_space()
    yield from _left_of_control_group()


def _left_of_address_space() -> Iterator[int]:
    import resource  # only where there is a /proc: Windows has no such module

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        yield max(0, most - pages * resource.getpagesize())


def _left_of_control_group(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    for most, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory" / "memory.limit_in_bytes", root / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            limit = most.read_text(encoding="ascii").strip()
            if limit != "max":
                yield max(0, int(limit) - int(used.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
