"""The library's own group of processes, beside each group of the user's.

Collectives pair by their order within a group. In a group of its own no message of the library is ever paired with a
collective of the user's, however many of them some process makes. It is made when the first message is sent, by those
processes alone that are in it, so a step which one process made and never used keeps nobody waiting.
"""

from __future__ import annotations

import datetime
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from gradaccum.sync import faults

_Owned = dict[float | None, ProcessGroup]
_OWNED: WeakKeyDictionary[ProcessGroup, _Owned] = WeakKeyDictionary()  # groups cost sockets and threads


def own_group(of: ProcessGroup, timeout: float | None) -> ProcessGroup:
    """The library's group of the same processes; each of them has to ask for it.

    Args:
        of: one of the user's groups.
        timeout: seconds that a message may wait for another process; None for what the user's group has.

    Raises:
        RuntimeError: another process did not ask for it in time.
    """
    if of not in _OWNED:
        faults.tell_of_the_end(dist.get_rank())
    owned = _OWNED.setdefault(of, {})
    if timeout not in owned:
        # Messages go from host to host where that can be, so that no device is waited for.
        has_hosts = dist.is_gloo_available() and dist.get_backend(of) not in ("fake", "mpi")
        made: Any = dist.new_group(
            dist.get_process_group_ranks(of),
            timeout=_timeout_of(of) if timeout is None else datetime.timedelta(seconds=timeout),
            backend="gloo" if has_hosts else None,
            use_local_synchronization=dist.get_backend(of) != "mpi",
        )
        owned[timeout] = made
    return owned[timeout]


def _timeout_of(group: ProcessGroup) -> datetime.timedelta | None:
    """The time limit of one of the user's groups; None, for torch's default, where it does not say."""
    for device_type in group._device_types:
        options = getattr(group._get_backend(torch.device(device_type.type)), "options", None)
        found = getattr(options, "_timeout", None)
        if found is not None:
            return found
    return None
