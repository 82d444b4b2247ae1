"""What is audited, checked, and ways to cut its batch: ragged at first, and else as its code can run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from gradaccum.auditing.audit_run import Step, Task
from gradaccum.auditing.outside_modules import outside_modules
from gradaccum.checking.pieces import Piece, equal_sizes, pieces, planned_pieces, ragged_sizes
from gradaccum.errors import BatchError, WindowError
from gradaccum.fit.workload import Workload
from gradaccum.split.by_samples import cuts_anywhere, split_by_groups
from gradaccum.types import GhostBatch, Split
from gradaccum.whole_batch.runners import RunnerOptions
from gradaccum.window.parameters import as_sequence

# Samples that may belong together: pairs, triplets, the completions of a prompt.
_TOGETHER = (2, 3, 4, 5, 6, 8, 16)


def make_task(
    model: nn.Module | Sequence[nn.Module],
    batch: Any,
    options: RunnerOptions,
    *,
    make_step: Callable[..., Step],
    split: Split | None = None,
    more_options: Mapping[str, Any] | None = None,
) -> Task:
    """Returns a task: a step of these options, the batch it is to be held against, and what the loss function runs.

    Args:
        model: as for `TrainStep`.
        batch: two rows at least.
        options: of the step; its functions among them.
        make_step: makes a `TrainStep`.
        split: of the user's own.
        more_options: of the step, about how gradients add up.

    Raises:
        WindowError: an option that makes no sense.
        BatchError: rows disagree, or there are fewer than two.
        ParameterError: there is nothing to train.
    """
    models: list[nn.Module] = as_sequence(model, nn.Module, name="model")
    loss = options.batch_loss
    if isinstance(loss, nn.Module) and loss not in models:  # with parameters of its own
        models.append(loss)
    workload = Workload.checked(models, options.loss_fn, batch, forward=options.forward, batch_loss=loss, split=split)
    if workload.rows < 2:
        raise BatchError(
            "The batch has 1 row, which cannot be cut in two. Pass a batch of a few micro-batches: 3 * "
            "micro_batch_size samples show as much as more would."
        )
    inherited: dict[str, Any] = {field.name: getattr(workload, field.name) for field in fields(Workload)}
    inherited |= {"model": model, "split": options.split(split, max_rows=None)}
    return Task(
        **inherited,
        options=options,
        more_options=more_options or {},
        make_step=make_step,
        others=outside_modules(workload, model),
    )


def check_size(micro_batch_size: Any) -> None:
    """Checks what a user has passed for the size of micro-batches.

    Raises:
        WindowError: it is no number of samples.
    """
    if isinstance(micro_batch_size, Tensor) and micro_batch_size.dim():
        raise WindowError(
            f"micro_batch_size is a tensor of shape {tuple(micro_batch_size.shape)}: a part of the batch, it seems, "
            "which is one argument. Write audit(model, loss_fn, (x, y)); loss_fn(model, micro_batch) takes it apart."
        )
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise WindowError(
            f"micro_batch_size={micro_batch_size!r}: it is the number of samples that one forward sees, an int of at "
            "least 1. Where it is found while training, pass a size that was found."
        )


def ways_to_cut(task: Task, micro_batch_size: int) -> list[list[Piece]]:
    """Returns ways to cut the batch, of which the first that the user's code can run is taken.

    A split of the user's own decides for itself, and is asked for sizes that leave unequal pieces. Otherwise pieces
    are ragged; where code cannot run them, they are equal, or multiples of what may belong together.

    Raises:
        BatchError: the split leaves the batch in one piece.
    """
    if not _is_cut_anywhere(task):
        return _planned(task, micro_batch_size)
    rows, ways = task.rows, [ragged_sizes(task.rows, micro_batch_size), equal_sizes(task.rows, micro_batch_size)]
    for together in _TOGETHER:
        groups, rest = divmod(rows, together)
        if not rest and groups > 1:
            ways.append([together * size for size in ragged_sizes(groups, max(1, micro_batch_size // together))])
    return [pieces(sizes) for sizes in dict.fromkeys(map(tuple, ways))]


def equal_cut(task: Task, micro_batch_size: int) -> list[Piece]:
    """Returns pieces as equal as training's would be."""
    if not _is_cut_anywhere(task):
        return ways_to_cut(task, micro_batch_size)[0]
    return pieces(equal_sizes(task.rows, micro_batch_size))


def _is_cut_anywhere(task: Task) -> bool:
    return cuts_anywhere(task.split) and not isinstance(task.options.batch_norm, GhostBatch)


def _planned(task: Task, micro_batch_size: int) -> list[list[Piece]]:
    groups, split = task.options.batch_norm, task.split
    sizes = [micro_batch_size - less for less in range(3)] + [-(-task.rows // 2), 1]
    if isinstance(groups, GhostBatch):  # the step cuts by itself, between groups
        split, half = split_by_groups(groups), -(-task.rows // (2 * groups.samples)) * groups.samples
        sizes = [max(groups.samples, min(micro_batch_size, half))]
    largest = split.largest(task.batch)
    plans = [
        planned_pieces(split.plan(task.batch, largest, max_rows=rows)) for rows in dict.fromkeys(sizes) if rows > 0
    ]
    plans = [plan for plan in plans if len(plan) > 1]
    if not plans:
        raise BatchError(
            f"The split leaves the batch of {task.rows} samples in one piece, so there is nothing to compare: whatever "
            "the loss is, one micro-batch is the whole batch. Pass a batch of several micro-batches."
        )
    return sorted(plans, key=lambda plan: len({piece.rows for piece in plan}) == 1)
