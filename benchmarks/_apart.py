"""Loops that each have a process of their own; one of them runs at a time.

Loops in one process share its allocator. The holes that one leaves are memory that the next one need not have from the
system, cleared page by page, and that is much of what accumulation costs: at 256 tokens of GPT-2 small the library's
loop made 0.4 million page faults an update by itself, and next to none after the textbook loop. A program that trains
has one loop.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import torch
from _timing import Clocked, Loop, clocked

_ENDING_SECONDS = 10


@contextmanager
def apart(makers: Mapping[str, Callable[[], Loop]]) -> Iterator[dict[str, Clocked]]:
    """Starts a process for each loop, and ends them all.

    Args:
        makers: by name; what makes the loop, in its process. It goes there pickled.

    Yields:
        For each loop what has it run once, and tells how long it took there.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process in which a backward has run can run none
    connections: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for make in makers.values():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make, torch.get_num_threads()), daemon=True)
            process.start()
            there.close()
            connections.append(here)
            processes.append(process)
        yield {name: _asking(name, here) for name, here in zip(makers, connections, strict=True)}
    finally:
        for here in connections:
            here.close()
        for process in processes:
            process.join(_ENDING_SECONDS)


@contextmanager
def together(makers: Mapping[str, Callable[[], Loop]]) -> Iterator[dict[str, Clocked]]:
    """The same with all loops in this process, for a quick look."""
    yield {name: clocked(make()) for name, make in makers.items()}


def _asking(name: str, connection: Connection) -> Clocked:
    def ask() -> tuple[float, float]:
        try:
            connection.send(None)
            answer = connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process of {name!r} has ended: was there memory for all of them?") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{name!r} failed in its process:\n{answer}")
        return answer

    return ask


def _serve(connection: Connection, make: Callable[[], Loop], threads: int) -> None:
    """Runs the loop each time it is asked to, until nobody is there to ask."""
    torch.set_num_threads(threads)
    run: Clocked | None = None
    with suppress(EOFError, OSError):
        while True:
            connection.recv()
            answer: tuple[float, float] | str
            try:
                if run is None:
                    run = clocked(make())
                answer = run()
            except Exception:  # noqa: BLE001 - told where it is raised
                answer = traceback.format_exc()
            connection.send(answer)
