"""The error for a loss whose pieces do not add up to the whole: the numbers, and what was tried and is right.

The roots are run anew, without what the step adds to them, for `remedies` to find out what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gradaccum.checking.look_run import Draw, Look, Side
from gradaccum.checking.pieces import copied
from gradaccum.checking.remedies import Diagnosis, remedies
from gradaccum.checking.root_runs import PLAIN, Run, make_run
from gradaccum.errors import LossError, MeanError
from gradaccum.tree import to_device
from gradaccum.types import Rows
from gradaccum.window.parameters import named_parameters
from gradaccum.window.weights import weights_by_name

_FINEST = 1e-7  # relative: no more is asked of a remedy, whatever its dtype


def loss_fault(
    look: Look,
    whole: Side,
    parts: Side,
    sizes: Sequence[int],
    samples: Sequence[int],
    off: float,
    tolerance: float,
    draw: Draw,
) -> LossError:
    """The error for a loss that does not add up.

    Args:
        look: the rows at hand.
        whole: of them together.
        parts: of the pieces, added up as the step adds them up.
        sizes: of the pieces, in atoms of the look.
        samples: the same in samples.
        off: how far the gradients are apart.
        tolerance: above which a difference is none of rounding.
        draw: how random numbers were drawn.
    """
    is_of_batch = look.step.options.loss_fn is None
    diagnosis, roots = (Diagnosis(kind="unknown"), []) if is_of_batch else _diagnosed(look, sizes, tolerance, draw)
    pieces = " + ".join(map(str, samples))
    numbers = f"{sum(samples)} samples together have a loss of {whole.loss:.6g}"
    values = [next(iter(run.terms.values())).value for run in roots]
    if values and len(roots[0].terms) == 1:
        numbers += f", pieces of {pieces} have {' and '.join(f'{value:.6g}' for value in values)}"
    text = (
        f"The loss does not add up over micro-batches: {numbers}, which make {parts.loss:.6g} as they are weighted. "
        f"The gradient would be off by {off:.2g} of its size."
    )
    if diagnosis.what:
        text += f" {diagnosis.what}."
    text += _advice(diagnosis, is_of_batch=is_of_batch, combine=look.step.options.combine)
    is_plain = not is_of_batch and (
        not roots or any(term.kind == PLAIN for run in roots for term in run.terms.values())
    )
    return (MeanError if is_plain else LossError)(text)


def _advice(diagnosis: Diagnosis, *, is_of_batch: bool, combine: str) -> str:
    tried, untried = "", ""
    if diagnosis.instead:
        one = len(diagnosis.instead) == 1
        lines = "\n".join(f"    {line}" for entry in diagnosis.instead for line in [entry.replace("\n", "\n    ")])
        tried = f" Tried on these samples, and right{'' if one else ', each by itself'}:\n{lines}\n"
    if diagnosis.untried:
        untried = f" What may help, and cannot be tried here: {'; or '.join(diagnosis.untried)}."
    if tried or untried:
        return tried + untried
    if is_of_batch and combine == "sum":
        return (
            ' With forward= and combine="sum" outputs are added up over micro-batches, so each must be a sum over '
            "samples, no mean: return sums and counts, and divide in batch_loss."
        )
    if is_of_batch:
        return (
            " The outputs of forward= depend on the samples that share a micro-batch, or index 0 of one is not the "
            "sample."
        )
    return (
        " Return it with what it was averaged over, ga.Loss.mean(loss, over=count), or as a sum, ga.Loss.sum(loss); a "
        "loss that couples samples is forward= and batch_loss=. None of them could be tried on these samples. To train "
        'all the same: check="off".'
    )


def _diagnosed(look: Look, sizes: Sequence[int], tolerance: float, draw: Draw) -> tuple[Diagnosis, list[Run]]:
    """What the loss is, and the runs of the pieces; nothing where they cannot be had."""
    step = look.step
    parameters = [one for _, one in named_parameters(step.models) if one.requires_grad]

    def run(rows: Tensor, *, in_full: bool = True) -> Run:
        with look.running([rows], draw=Draw() if draw.replay is None else draw) as (around, split):
            batch = to_device(split.cut(copied(look.batch), rows), parameters[0].device)
            weights = step.options.weights
            loss = around(step.options.loss_fn)(step.model, batch)
            return make_run(
                loss,
                parameters,
                rows=rows,
                batch=batch,
                weights=None if weights is None else weights_by_name(weights(batch)),
                in_full=in_full,
            )

    everything, *pieces = (_indices(piece) for piece in (*look.pieces([len(look.atoms)]), *look.pieces(sizes)))
    with suppress(Exception):  # whatever the user's code raises here, it is no answer to what it is
        parts = [run(piece) for piece in pieces]
        return remedies(run(everything), parts, run, tolerance=max(tolerance, _FINEST)), parts
    return Diagnosis(kind="unknown"), []


def _indices(rows: Rows) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
