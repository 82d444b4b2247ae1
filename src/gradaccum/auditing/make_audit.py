"""`audit_task`: does accumulation make the update the whole batch would have made, and if not, why?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from gradaccum.auditing import culprits
from gradaccum.auditing.audit_report import Report
from gradaccum.auditing.audit_run import AS_IT_IS, RunResult, Runs, Substitutions, Task
from gradaccum.auditing.audit_task import equal_cut, ways_to_cut
from gradaccum.auditing.culprits import Culprit
from gradaccum.auditing.in_double import SHORTER
from gradaccum.auditing.suspects import attempted, buffer_culprits, find_culprits
from gradaccum.auditing.try_remedies import Remedies, wide_sums_error
from gradaccum.checking.compare import BIASED, MISSING, SCALED, compare, flat, relative_error
from gradaccum.checking.pieces import Piece, equal_sizes
from gradaccum.checking.random_ops import UNMATCHED
from gradaccum.errors import BatchError, GradAccumError, LossError
from gradaccum.window.parameters import named_parameters

# Rounding in float64 leaves 1e-16 to 1e-13 of a gradient; the smallest fault of the taxonomy, one sample in a million
# weighted wrongly, 1e-6.
_EXACT = 1e-10
# How much more than a change of every parameter in its last bit rounding may move a gradient: it happens in every
# operation of a forward and backward.
_OPERATIONS = 1000
# Rounding may not excuse more than this.
_MOST_ROUNDING = 1e-3
# Where float64 is not possible: by dtype, above what summation orders and kinks of ReLU were seen to do.
_INEXACT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# How many times the whole batch's own rounding the accumulated gradient's may be, before adding up is to blame.
_MORE_ROUNDING = 2.0
_MOST_SIZES = 8
_NOT_IN_DOUBLE = "float64, in which rounding would not hide small faults; the model cannot run in it"


def audit_task(task: Task, micro_batch_size: int) -> Report:
    """Returns the report on a task in micro-batches of at most so many samples.

    Raises:
        BatchError: the split leaves the batch in one piece, or the user's functions run none of the pieces tried.
        LossError: the whole batch's own gradient is not finite.
    """
    cuts = ways_to_cut(task, micro_batch_size)
    not_checked = _hooked_parameters(task)
    runs = Runs(task, is_double=True)
    whole = attempted(runs.whole, _NOT_IN_DOUBLE, not_checked)
    if whole is None:  # a mistake of the user's own comes again in the model's own dtype
        runs = Runs(task, is_double=False)
        whole = runs.whole()
    _check_finite(whole)
    own_dtype = _own_dtype(task)
    cut, accumulated, failed = _first_that_runs(runs, cuts)
    error = relative_error(accumulated.gradients, whole.gradients)
    tolerance = _tolerance(runs, whole, own_dtype, error)
    if error > tolerance:
        found = find_culprits(runs, cut, (whole, accumulated), tolerance=tolerance, not_checked=not_checked)
    else:
        found = buffer_culprits(task.modules(), whole, accumulated, moved=0.0, tolerance=tolerance)
        found = Remedies(runs, cut, tolerance=tolerance, rest=error).of_buffers(found, AS_IT_IS)
    compared, equal_error, equal = accumulated.gradients, error, equal_cut(task, micro_batch_size)
    if error > tolerance and equal != cut and not failed:
        again = runs.accumulated(equal).gradients
        equal_error = relative_error(again, whole.gradients)
        verdicts = {one.verdict for one in compare(again, whole.gradients, tolerance=tolerance)}
        if SCALED in verdicts and not verdicts & {BIASED, MISSING}:  # ragged pieces hide it: they are not scaled alike
            compared, error, cut = again, equal_error, equal
    own_errors = _own_errors(runs, cut, whole, own_dtype, not_checked)
    if own_errors is not None and _is_imprecise(task, *own_errors):
        found.append(_imprecision(runs, cut, own_dtype, *own_errors))
    return Report(
        exact=not found,
        relative_error=error,
        tolerance=tolerance,
        culprits=tuple(found),
        parameters=compare(compared, whole.gradients, tolerance=tolerance),
        samples=task.rows,
        micro_batch_sizes=tuple(piece.rows for piece in cut),
        equal_sizes_error=equal_error,
        dtype=_name(torch.float64 if runs.is_double else own_dtype),
        own_dtype=_name(own_dtype),
        own_error=own_errors and own_errors[0],
        own_whole_error=own_errors and own_errors[1],
        autocast=_autocast(task),
        not_checked=tuple(not_checked),
        notes=(*failed, *_notes(task, runs, whole, found, micro_batch_size)),
    )


def _first_that_runs(runs: Runs, cuts: Sequence[Sequence[Piece]]) -> tuple[Sequence[Piece], RunResult, list[str]]:
    """The first of several ways to cut that the user's functions can run, and a note about those that they cannot."""
    first: Exception | None = None
    for cut in cuts:
        try:
            accumulated = runs.accumulated(cut)
        except GradAccumError:
            raise
        except Exception as error:  # noqa: BLE001  # the user's code, for which the whole batch was no trouble
            first = first or error
            continue
        if first is None:
            return cut, accumulated, []
        return cut, accumulated, [f"pieces of {_sizes(cuts[0])} samples could not be run ({_line(first)}), so it was "
                                  f"cut into {_sizes(cut)}. Training cuts as it likes: pass split=, or a "
                                  "micro_batch_size that is a multiple of what belongs together."]  # fmt: skip
    assert first is not None
    tried = "; ".join(map(_sizes, cuts))
    raise BatchError(
        f"The whole batch of {runs.task.rows} samples runs, and its pieces do not (tried: {tried}): {_line(first)}. "
        "Training would stop with the same error. If samples belong together, pass a split= that keeps them together; "
        "if the loss needs the whole batch, forward= and batch_loss=."
    ) from first


def _sizes(cut: Sequence[Piece]) -> str:
    shown = ", ".join(str(piece.rows) for piece in cut[:_MOST_SIZES])
    return shown + (", ..." if len(cut) > _MOST_SIZES else "")


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _check_finite(whole: RunResult) -> None:
    gradients = whole.gradients
    wrong = [name for name, one in gradients.items() if one is not None and not bool(flat(one).isfinite().all())]
    if wrong:
        raise LossError(
            f"The whole batch's own gradient is not finite, in {len(wrong)} of {len(gradients)} parameters "
            f"({wrong[0]}), so there is nothing to compare with. Pass a batch on which the loss and its gradient are "
            "finite."
        )


def _tolerance(runs: Runs, whole: RunResult, own_dtype: torch.dtype, error: float) -> float:
    """What counts as rounding; where it is close, by how the gradient answers to a change in the last bit."""
    if not runs.is_double:
        return _INEXACT.get(own_dtype, _EXACT)
    if not _EXACT < error < _MOST_ROUNDING:
        return _EXACT
    changed = runs.whole(Substitutions(parameter_change=torch.finfo(torch.float64).eps))
    moved = relative_error(changed.gradients, whole.gradients)
    return max(_EXACT, min(_OPERATIONS * moved, _MOST_ROUNDING))


def _own_errors(
    runs: Runs, cut: Sequence[Piece], whole: RunResult, own_dtype: torch.dtype, not_checked: list[str]
) -> tuple[float, float] | None:
    """What the model's own dtype does to both gradients, accumulated and whole, each against itself in float64."""
    if not runs.is_double or own_dtype not in SHORTER:
        return None
    own = runs.in_own_dtype()

    def measured() -> tuple[float, float]:
        own_whole_error = relative_error(own.whole().gradients, whole.gradients)
        return relative_error(own.accumulated(cut).gradients, runs.accumulated(cut).gradients), own_whole_error

    # It may fail where float64 does not: half precision without its kernels.
    return attempted(measured, f"{_name(own_dtype)}, the model's own dtype", not_checked)


def _is_imprecise(task: Task, own_error: float, own_whole_error: float) -> bool:
    is_short = any(parameter.dtype in (torch.bfloat16, torch.float16) for _, parameter in named_parameters(task.models))
    return is_short and math.isfinite(own_whole_error) and not own_error <= _MORE_ROUNDING * own_whole_error


def _imprecision(
    runs: Runs, cut: Sequence[Piece], own_dtype: torch.dtype, own_error: float, own_whole_error: float
) -> Culprit:
    """The culprit of sums that are rounded, with what came of wider ones."""
    wide_error = wide_sums_error(runs, cut)
    ours, theirs, wide = (f"{100 * error:.2g}%" for error in (own_error, own_whole_error, wide_error))
    fault = culprits.PRECISION if wide_error < own_error else culprits.PRECISION_OF_CODE
    return fault.found(
        own_error,
        "the gradients",
        tried=f"on this batch, sums in float32 are off by {wide}.",
        dtype=_name(own_dtype),
        accumulated=ours,
        whole=theirs,
    )


def _own_dtype(task: Task) -> torch.dtype:
    """The dtype that most of the trained numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for _, parameter in named_parameters(task.models):
        counts[parameter.dtype] += parameter.numel() * parameter.requires_grad
    return counts.most_common(1)[0][0]


def _autocast(task: Task) -> str | None:
    kind = task.device.type
    return _name(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def _hooked_parameters(task: Task) -> list[str]:
    """Hooks on parameters, which these runs do not show."""
    hooked = [
        name
        for name, parameter in named_parameters(task.models)
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    if not hooked:
        return []
    more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
    return [
        f"hooks on parameters ({hooked[0]}{more}), which run once for each micro-batch: clipping or noise in them is "
        "not that of the batch's gradient."
    ]


def _notes(task: Task, runs: Runs, whole: RunResult, found: Sequence[Culprit], micro_batch_size: int) -> list[str]:
    notes: list[str] = []
    count = len(equal_sizes(task.rows, micro_batch_size))
    if whole.divisor is not None and abs(whole.divisor - count) < 1e-9:
        notes.append(
            f"the loss is divided by {count}, the number of micro-batches, here as in the whole batch. The library "
            f"divides already, so the gradient is 1/{count} of that of the loss you mean: leave the division out."
        )
    if not any(module.training for model in task.models for module in model.modules()):
        notes.append("the model is in eval mode, in which BatchNorm and dropout do nothing: model.train().")
    if runs.refused is not None:
        notes.append("training would stop in the first window with this loss, and say so.")
    if micro_batch_size >= task.rows:
        notes.append(
            f"micro_batch_size={micro_batch_size} takes the whole batch in one piece; it was cut all the same."
        )
    if UNMATCHED in runs.draws.not_replayed.values() and not found:
        notes.append("some random draws could not be told apart by sample; they made no difference.")
    return notes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
