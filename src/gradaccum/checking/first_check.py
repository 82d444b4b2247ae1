"""The look before a step's first update: a few rows together, held against two unequal pieces of them.

Both sides go through the step's own machinery (its runner, its way to weigh and add up), the pieces as micro-batches,
the rows together as a batch that is not cut. Both start from the same state, and nothing of them is left behind
(`no_trace`). What is compared is the gradient, and the state that forwards leave.

A difference is believed only if it is none of these: random draws (replayed, if anything was drawn), a loss function
that gives something else whenever it is called, pieces of a single sample that training would not run, rounding
(measured: parameters are moved in their last bit). What cannot be told from a fault is not checked, and said so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradaccum import tree
from gradaccum.checking.findings import Difference, Finding, blame
from gradaccum.checking.look_run import CannotLook, Draw, Look, Side
from gradaccum.checking.module_outputs import Recording
from gradaccum.checking.pieces import copied
from gradaccum.checking.random_ops import Draws
from gradaccum.checking.side_difference import (
    LAST_BIT,
    MORE_THAN_MEASURED,
    TOLERANCE,
    difference,
    dtypes_of,
    lowest_precision,
    norm,
    state_difference,
)
from gradaccum.checking.step_to_check import StepToCheck
from gradaccum.memory.out_of_memory import free_memory, is_out_of_memory, let_go_of
from gradaccum.split.asked import joins_rows, part_to_check, rows_in, smallest_pieces
from gradaccum.types import Rows, num_rows
from gradaccum.window.over_ranks import OverRanks
from gradaccum.window.plan_line import NOT_CHECKED, exact_on

_MOST_ROWS = 8
_MOST_ROUNDING = 0.1  # of a gradient: where rounding may change as much, nothing can be said
_WORTH_SAYING = 1e-3  # of a gradient: what differs by more than this is not called exact without a word
_LONGEST_ERROR = 120
# Unequal pieces first: equal ones hide counts that are wrong. Then such that pairs stay pairs, then equal ones.
_CUTS = {
    8: ((5, 3), (6, 2), (4, 4)),
    6: ((4, 2), (3, 3)),
    4: ((3, 1), (2, 2)),
    3: ((2, 1),),
    2: ((1, 1),),
}


def look_first(step: StepToCheck, batch: Any, planned: Sequence[Rows], *, ranks: OverRanks | None) -> Finding:
    """Looks at a few rows of a batch, and leaves everything as it was.

    Args:
        step: what trains.
        batch: the first batch.
        planned: the micro-batches that training is about to run, or could run.
        ranks: the processes that train together: each looks at rows of its own, and all agree on what was found.

    Returns:
        What was found. Out of memory means fewer rows; where the user's code raises, nothing was checked.
    """
    if ranks is None:
        return _look(step, batch, planned)
    if ranks.runs_collectives or ranks.shards:
        return Finding(evidence=f"{NOT_CHECKED}: forwards of a sharded model wait for other processes")
    if any(isinstance(module, nn.SyncBatchNorm) for model in step.models for module in model.modules()):
        return Finding(evidence=f"{NOT_CHECKED}: SyncBatchNorm waits for other processes")
    own = _look(step, batch, planned) if sum(map(num_rows, planned)) > 1 else None
    found = [one for one in ranks.share_findings(own) if one is not None]
    if not found:
        return Finding(evidence=f"{NOT_CHECKED}: no process has two samples")
    return max(found, key=lambda one: one.severity)


def _look(step: StepToCheck, batch: Any, planned: Sequence[Rows]) -> Finding:
    if sum(map(num_rows, planned)) < 2:
        return Finding(evidence=f"{NOT_CHECKED}: the first batch has one sample")
    most = max(2, min(_MOST_ROWS, max(map(num_rows, planned))))
    reason = ""
    for rows in (rows for rows in _CUTS if rows <= most):
        try:
            return _look_at(step, batch, planned, rows)
        except CannotLook as why:
            return Finding(evidence=f"{NOT_CHECKED}: {why}")
        except Exception as error:  # noqa: BLE001  # whatever it is, training itself shows it
            if not is_out_of_memory(error):
                reason = reason or f"{rows} samples at once raise {_in_short(error)}"
                continue
            reason = reason or f"{rows} samples at once run out of memory"
            let_go_of(error)
        free_memory(next(step.models[0].parameters()).device)
    return Finding(evidence=f"{NOT_CHECKED}: {reason}")


def _look_at(step: StepToCheck, batch: Any, planned: Sequence[Rows], rows: int) -> Finding:
    """Looks at so many rows, cut in one way after another.

    Raises:
        Exception: what the rows together raise.
    """
    look = _chosen(step, batch, planned, rows)
    runs_single = min(map(num_rows, planned)) == 1
    whole = look.run([len(look.atoms)])
    cuts = _CUTS.get(len(look.atoms), ())
    raised: str = ""
    found: Finding | None = None
    for sizes in cuts:
        try:
            parts = look.run(sizes)
        except Exception as error:  # odd pairs, say, which training need not have
            if is_out_of_memory(error):
                raise
            raised = raised or f"pieces of {' + '.join(map(str, sizes))} samples raise {_in_short(error)}"
            continue
        found = _compared(look, whole, parts, sizes)
        # A single sample, which training does not run, may be a case of its own: BatchNorm, or squeeze(). Gradients of
        # a few samples may agree by chance, where the same ones are clipped, or chosen: the loss's value shows it.
        if not (found.is_fault and 1 in look.samples(sizes) and not runs_single) and not found.is_value_off:
            return found
    if found is not None and len(look.atoms) < 4 <= rows_in(step.split, part_to_check(step.split, batch)):
        return _look_at_pairs(step, batch, planned)
    return found or Finding(evidence=f"{NOT_CHECKED}: {raised}")


def _look_at_pairs(step: StepToCheck, batch: Any, planned: Sequence[Rows]) -> Finding:
    """Two pieces of two samples, where single ones were at fault: more rows at once than in training."""
    look = _chosen(step, batch, planned, 4)
    return _compared(look, look.run([4]), look.run([2, 2]), [2, 2])


def _chosen(step: StepToCheck, batch: Any, planned: Sequence[Rows], rows: int) -> Look:
    """Rows of the batch, evenly spread, on the device; samples that a split keeps together stay together."""
    device = next(step.models[0].parameters()).device
    if not joins_rows(step.split):
        raise CannotLook("ready micro-batches run as they are, and are not joined")
    if not type(step.split).__module__.startswith("gradaccum."):
        # A split of the user's own may know rows of its batch only: its first micro-batch is looked at, where it is.
        if step.options.batch_loss is not None or step.options.is_lockstep or num_rows(planned[0]) < rows:
            raise CannotLook("split= cuts whole batches only")
        atoms = _single_rows(planned[0])[:rows]
        return Look(step, tree.to_device(copied(batch), device), atoms)
    batch = part_to_check(step.split, batch)
    atoms = smallest_pieces(step.split, batch)
    each = max(map(num_rows, atoms))
    count = rows // each
    if each > 1 and count < 2:
        count = 2 if 2 * each <= max(map(num_rows, planned)) else 0
    if count < 2 or len(atoms) < 2:
        raise CannotLook(f"groups of {each} samples stay together, and one forward has fewer than two of them")
    count = max(one for one in _CUTS if one <= min(count, len(atoms)))
    atoms = sorted(atoms, key=lambda atom: atom.start if isinstance(atom, slice) else int(atom[0]))
    spread = [atoms[i * (len(atoms) - 1) // (count - 1)] for i in range(count)]
    # In the batch's order, so that what is paired by its place stays paired.
    indices, order = torch.cat([_indices(atom) for atom in spread]).sort()
    few = step.split.cut(batch, indices)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return Look(step, tree.to_device(copied(few), device), [_as_rows(one) for one in places.split(_sizes(spread))])


def _single_rows(rows: Rows) -> list[Rows]:
    if isinstance(rows, slice):
        return [slice(i, i + 1) for i in range(rows.start, rows.stop)]
    return [rows[i : i + 1] for i in range(len(rows))]


def _sizes(pieces: Sequence[Rows]) -> list[int]:
    return [num_rows(piece) for piece in pieces]


def _as_rows(indices: torch.Tensor) -> Rows:
    first, last = int(indices[0]), int(indices[-1])
    is_run = last - first == len(indices) - 1 and bool((indices.diff() == 1).all())
    return slice(first, last + 1) if is_run else indices


def _indices(rows: Rows) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()


def _compared(look: Look, whole: Side, parts: Side, sizes: Sequence[int]) -> Finding:
    """What two sides say."""
    together = [len(look.atoms)]
    size = norm(whole.gradients)
    if not 0 < size < float("inf"):
        what = "is zero" if size == 0 else "is not finite"
        return Finding(evidence=f"{NOT_CHECKED}: the gradient of the samples looked at {what}")
    dtype = lowest_precision(dtypes_of(look.step.models))
    seen = _difference(look, whole, parts, sizes, Draw(), TOLERANCE[dtype])
    if seen.is_any:  # autocast may be on inside of the loss function
        found = Recording()
        look.run(together, recording=found)
        dtype = lowest_precision({dtype, *found.dtypes})
        seen = _difference(look, whole, parts, sizes, Draw(), TOLERANCE[dtype])
    for draw in _draws(look):
        if not seen.is_any:
            break
        again = look.run(together, draw=draw), look.run(sizes, draw=draw)
        seen = _difference(look, *again, sizes, draw, TOLERANCE[dtype])
    if not seen.is_any:
        return _exact(seen, dtype) if _values_agree(look, seen, together) else _of_another_value(seen)
    recordings = Recording(), Recording()
    repeated = look.run(together, draw=seen.draw, recording=recordings[0])
    off_by_itself = difference(repeated.gradients, seen.whole.gradients)
    if (seen.draw.replay is None and off_by_itself > seen.tolerance) or off_by_itself > max(
        seen.off / 2, seen.tolerance
    ):
        return Finding(evidence=f"{NOT_CHECKED}: the loss of the same samples is another one when it is made again")
    look.run(sizes, draw=seen.draw, recording=recordings[1])
    nudged = look.run(together, draw=seen.draw, nudge=LAST_BIT[dtype])
    rounding = MORE_THAN_MEASURED[dtype] * difference(nudged.gradients, repeated.gradients)
    tolerance = max(TOLERANCE[dtype], min(rounding, _MOST_ROUNDING))
    seen = _difference(look, seen.whole, seen.parts, sizes, seen.draw, tolerance)
    if not seen.is_any:
        return _exact(seen, dtype)
    if not seen.state and seen.off <= rounding:
        return Finding(evidence=f"{NOT_CHECKED}: rounding alone may change the gradient by {rounding:.1g} of its size")
    if look.draws_outside and not seen.state:
        return Finding(evidence=f"{NOT_CHECKED}: what Python's random or NumPy draw for a sample cannot be replayed")
    if seen.draw.replay is not None and seen.draw.replay.not_replayed:
        where, operation = next(iter(seen.draw.replay.not_replayed))
        return Finding(evidence=f"{NOT_CHECKED}: what {operation} draws in {where} cannot be replayed")
    return blame(look, seen, recordings)


def _exact(seen: Difference, dtype: torch.dtype) -> Finding:
    evidence = exact_on(seen.samples) + seen.draw.reservation
    if seen.off > _WORTH_SAYING:  # which is rounding, as far as can be told
        evidence += f" to within {seen.tolerance:.2g}, in {str(dtype).removeprefix('torch.')}"
    return Finding(evidence=evidence)


def _values_agree(look: Look, seen: Difference, together: Sequence[int]) -> bool:
    """Whether the loss of the pieces is that of the rows together, but for rounding and draws."""
    off, size = abs(seen.parts.loss - seen.whole.loss), abs(seen.whole.loss)
    if off <= seen.tolerance * size or look.draws_tensors or look.draws_outside:
        return True
    recording = Recording()
    look.run(together, recording=recording)
    dtype = lowest_precision({*dtypes_of(look.step.models), *recording.dtypes})
    nudged = look.run(together, nudge=LAST_BIT[dtype])
    return off <= max(TOLERANCE[dtype] * size, MORE_THAN_MEASURED[dtype] * abs(nudged.loss - seen.whole.loss))


def _of_another_value(seen: Difference) -> Finding:
    why = f"the loss of {seen.cut} is {seen.whole.loss:.4g} and {seen.parts.loss:.4g}, though their gradients agree"
    return Finding(evidence=f"{NOT_CHECKED}: {why}", is_value_off=True)


def _difference(look: Look, whole: Side, parts: Side, sizes: Sequence[int], draw: Draw, tolerance: float) -> Difference:
    return Difference(
        whole=whole,
        parts=parts,
        sizes=sizes,
        samples=look.samples(sizes),
        off=difference(parts.gradients, whole.gradients),
        state=state_difference(parts, whole, tolerance=tolerance),
        tolerance=tolerance,
        draw=draw,
    )


def _draws(look: Look) -> list[Draw]:
    """Ways to draw in which a difference may be none, the strictest first."""
    found: list[Draw] = []
    if look.draws_tensors:
        found += [Draw(replay=Draws(look.rows)), Draw(replay=Draws(look.rows), is_alike=True)]
    if look.draws_outside:
        found += [dataclasses.replace(one, continues=True) for one in [*found[-1:], Draw()][:1]]
    return found


def _in_short(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    shown = text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
