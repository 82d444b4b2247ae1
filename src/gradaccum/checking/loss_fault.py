"""The error for a loss whose pieces do not add up to the whole: the numbers, and what was tried and is right.

The roots are run anew, without what the step adds to them, for `remedies` to find out what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gradaccum.checking.look_run import Draw, Look, Side
from gradaccum.checking.loss_errors import loss_error
from gradaccum.checking.pieces import copied
from gradaccum.checking.remedies import Diagnosis, remedies
from gradaccum.checking.root_runs import Run, make_run
from gradaccum.errors import LossError
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
) -> LossError | None:
    """The error for a loss that does not add up; None where it does if each piece starts from the same state.

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
    if look.step.options.loss_fn is not None:
        explained = _explained(look, sizes, tolerance, draw)
        if explained is not None:
            return None if explained[0].kind == "state" else explained[1]
    pieces = " + ".join(map(str, samples))
    return LossError(
        f"The loss does not add up over micro-batches: it is {whole.loss:.6g} for {sum(samples)} samples together, and "
        f"{parts.loss:.6g} from pieces of {pieces} of them. The gradient would be off by {off:.2g} of its size. "
        + _advice(look)
    )


def _advice(look: Look) -> str:
    options = look.step.options
    if options.loss_fn is not None:
        return (
            "Return it with what it was averaged over, ga.Loss.mean(loss, over=count), or as a sum, ga.Loss.sum(loss); "
            "a loss that couples samples is forward= and batch_loss=. None of them could be tried on these samples."
        )
    if options.combine == "sum":
        return (
            'With combine="sum" the outputs of forward= are added up over micro-batches, so each must be a sum over '
            "samples, no mean: return sums and counts, and divide in batch_loss."
        )
    return (
        "The outputs of forward= depend on the samples that share a micro-batch, or index 0 of one is not the sample."
    )


def _explained(look: Look, sizes: Sequence[int], tolerance: float, draw: Draw) -> tuple[Diagnosis, LossError] | None:
    """What the loss is, and the error that says so; None where its roots cannot be had."""
    step = look.step
    parameters = [one for _, one in named_parameters(step.models) if one.requires_grad]

    def run(rows: Tensor, *, in_full: bool = True) -> Run:
        with look.running(draw=Draw() if draw.replay is None else draw) as (around, split):
            batch = to_device(split.cut(copied(look.batch), rows), parameters[0].device)
            weights = step.options.weights
            call = around(step.options.loss_fn)
            return make_run(
                call(step.model, copied(batch)),
                parameters,
                rows=rows,
                batch=batch,
                weights=None if weights is None else weights_by_name(weights(batch)),
                in_full=in_full,
                again=lambda: call(step.model, copied(batch)),
            )

    everything, *pieces = (_indices(piece) for piece in (*look.pieces([len(look.atoms)]), *look.pieces(sizes)))
    with suppress(Exception):  # whatever the user's code raises here, it is no answer to what it is
        parts = [run(piece) for piece in pieces]
        together = run(everything)
        found = remedies(together, parts, run, tolerance=max(tolerance, _FINEST))
        return found, loss_error(together, parts, found)
    return None


def _indices(rows: Rows) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
