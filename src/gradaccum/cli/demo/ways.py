"""The three ways to train that are compared. Each is the loop that a user would write, and takes notes."""

from __future__ import annotations

from collections.abc import Callable

import torch

import gradaccum as ga
from gradaccum.cli.demo.run import Recorder, Run
from gradaccum.cli.demo.task import Task

Way = Callable[[Task, torch.dtype, Callable[[], None]], Run]
"""Trains a task in a precision, calling back at every update."""


def whole_batch(task: Task, dtype: torch.dtype, on_update: Callable[[], None]) -> Run:
    """One forward and backward an update: what accumulation is there to reproduce."""
    model = task.model().to(dtype)
    optimizer = task.optimizer(model.parameters())
    recorder = Recorder(model, optimizer, on_update)
    for _ in range(task.epochs):
        for x, y in task.loader(task.batch_size, dtype):
            loss = task.criterion(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.saw(loss.item(), task.count(y))
            recorder.updated()
    return recorder.run()


def textbook_loop(task: Task, dtype: torch.dtype, on_update: Callable[[], None]) -> Run:
    """The loop that everybody writes: ``loss / accum_iter``, a step every ``accum_iter`` or at the loader's end."""
    model = task.model().to(dtype)
    optimizer = task.optimizer(model.parameters())
    recorder = Recorder(model, optimizer, on_update)
    accum_iter = task.micro_batches
    for _ in range(task.epochs):
        loader = task.loader(task.micro_batch_size, dtype)
        for batch_idx, (x, y) in enumerate(loader):
            loss = task.criterion(model(x), y) / accum_iter
            loss.backward()
            recorder.saw(loss.item() * accum_iter, task.count(y))
            if (batch_idx + 1) % accum_iter == 0 or batch_idx + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
                recorder.updated()
    return recorder.run()


def library(task: Task, dtype: torch.dtype, on_update: Callable[[], None]) -> Run:
    """This library."""
    model = task.model().to(dtype)
    optimizer = task.optimizer(model.parameters())
    recorder = Recorder(model, optimizer, on_update)
    criterion = ga.criterion(task.criterion)
    accumulator = ga.Accumulator(model, optimizer, batch_size=task.batch_size)
    for _ in range(task.epochs):
        for x, y in accumulator.over(task.loader(task.micro_batch_size, dtype)):
            update = accumulator.backward(criterion(model(x), y))
            if update:
                numbers = update.as_dict()
                recorder.saw(numbers["loss"], numbers["weight"])
                recorder.updated()
    return recorder.run()
