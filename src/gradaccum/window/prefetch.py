"""Micro-batches on the model's device, each one on its way while the one before it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gradaccum import tree


def on_device(micro_batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The micro-batches moved to ``device``, one ahead of the one in use.

    On CUDA the copies are made from pinned memory on a stream of their own, so that they overlap with computing; the
    device holds three micro-batches of inputs at most, never the batch. Elsewhere nothing runs ahead: copies would
    block.
    """
    if device.type != "cuda":
        for micro_batch in micro_batches:
            yield tree.to_device(micro_batch, device)
        return
    stream = torch.cuda.Stream(device)

    def send(micro_batch: Any) -> Any:
        stream.wait_stream(torch.cuda.current_stream(device))  # what is on the device already may still be written
        with torch.cuda.stream(stream):
            return tree.to_device(micro_batch, device, non_blocking=True)

    in_use: deque[torch.cuda.Event] = deque()
    iterator = iter(micro_batches)
    end = object()
    first = next(iterator, end)
    on_its_way = end if first is end else send(first)
    while on_its_way is not end:
        current = on_its_way
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in tree.tensors(current):
            if tensor.device == device:
                tensor.record_stream(torch.cuda.current_stream(device))  # freed only when the forward has read it
        upcoming = next(iterator, end)
        on_its_way = end if upcoming is end else send(upcoming)
        yield current
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(device))
        in_use.append(used)
        if len(in_use) > 1:
            in_use.popleft().synchronize()  # or the host, which never waits, would send the whole batch ahead
