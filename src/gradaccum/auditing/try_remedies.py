"""Remedies, run on the batch at hand before they are printed, and what came of it in words.

    batch-norm    the step's own options, with all other culprits taken out
    loss-weight   the counts found, as shares of the micro-batches
    coupled-loss  several means with a count each; groups of samples; the whole batch's gradient on the outputs
    buffer        the module in evaluation mode
    precision     gradients added up in float32

A change inside of a user's layer or function cannot be tried, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradaccum.auditing import culprits
from gradaccum.auditing.audit_run import Runs, Substitutions
from gradaccum.auditing.culprits import Culprit
from gradaccum.auditing.isolate_samples import is_batch_norm
from gradaccum.auditing.loss_shares import LossFinding
from gradaccum.checking.compare import different_buffers, relative_error
from gradaccum.checking.isolate_state import copy_state
from gradaccum.checking.pieces import Piece
from gradaccum.checking.remedies import Diagnosis, remedies
from gradaccum.checking.root_runs import Run, make_run
from gradaccum.window.parameters import named_parameters

CHANGES_CODE = "not tried: it changes code of yours."
# Of a diagnosis whose lines were run, and the kind of culprit that it is.
_TRIED_KINDS = {"terms": "loss-weight", "weight": "loss-weight", "sum": "loss-weight", "groups": "coupled-loss"}
_MOST_LINES = 2
_MOST_LOOK_ROWS = 8
_BATCH_NORM_OPTIONS = {"exact": "", "frozen": "when fine-tuning "}


def worked(error: float, tolerance: float) -> str:
    """Returns how well a remedy that was run does."""
    if error <= tolerance:
        return f"it was run on this batch, and the gradient is the whole batch's, to {error:.1e}."
    return f"it was run on this batch, with all other culprits taken out, and {100 * error:.3g}% is left."


class Remedies:
    """Runs remedies for the culprits of one audit.

    ``rest`` is what is left of the error with all culprits taken out.
    """

    def __init__(self, runs: Runs, cut: Sequence[Piece], *, tolerance: float, rest: float) -> None:
        self._runs = runs
        self._cut = cut
        self._tolerance = tolerance
        self._rest = rest

    def of_batch_norm(self, accused: Sequence[Culprit], let_in: Substitutions) -> list[Culprit]:
        """Returns the culprits, those of BatchNorm with the options that help."""
        options, tried = self._batch_norm_options(let_in)
        fault = culprits.BATCH_NORM
        return [
            replace(
                fault.found(culprit.error, culprit.where, options=options, tried=tried),
                price=fault.price if '"exact"' in options else "nothing.",
            )
            if culprit.kind == fault.kind
            else culprit
            for culprit in accused
        ]

    def _batch_norm_options(self, let_in: Substitutions) -> tuple[str, str]:
        """What to type, and what came of it."""
        helpful, tried = "", list[str]()
        present = self._runs.task.options.batch_norm
        for option, when in _BATCH_NORM_OPTIONS.items():
            if option == present:
                tried.append(f'"{option}" is on, and does not reach it')
                continue
            try:
                # In lockstep there is no state between forwards to go back to.
                resets = let_in.resets_state and option != "exact"
                error = self._error(replace(let_in, step_options={"batch_norm": option}, resets_state=resets))
            except Exception as error:  # noqa: BLE001  # an option that refuses this layer, or this step
                tried.append(f'"{option}" is refused ({str(error).split(". ")[0]})')
                continue
            if error > self._tolerance:
                tried.append(f'"{option}" leaves {100 * error:.3g}%')
                continue
            typed = "batch_norm" if helpful else "ga.TrainStep(model, optimizer, loss_fn, batch_norm"
            helpful += f'{when}{typed}="{option}"{"" if helpful else ")"}; '
            tried.append(f'with "{option}" the gradient is the whole batch\'s, to {error:.1e}')
        return helpful, f"on this batch: {'; '.join(tried)}."

    def of_buffers(self, accused: Sequence[Culprit], moving: Substitutions) -> list[Culprit]:
        """Returns the culprits, those whose modules write their state in evaluation mode with another remedy."""
        modules = self._runs.task.modules()
        norms = [culprit.where for culprit in accused if is_batch_norm(modules[culprit.where])]
        if len(norms) == len(accused):
            return self.of_batch_norm(accused, moving) if accused else []
        evaluated = frozenset(culprit.where for culprit in accused if culprit.kind == culprits.BUFFER.kind)
        in_eval = replace(moving, evaluated=evaluated)
        error, left = self._error(in_eval), self._runs.accumulated(self._cut, in_eval).state
        still_written = different_buffers(left, copy_state(modules), self._tolerance)
        writes_in_eval = {where for where, _ in still_written}
        return [
            replace(culprit, remedy=culprits.ADVANCE_BY_HAND, tried=CHANGES_CODE)
            if culprit.where in writes_in_eval
            else replace(culprit, tried=worked(error, self._tolerance))
            if culprit.where in evaluated
            else culprit
            for culprit in accused
        ]

    def of_shares(self) -> str:
        """Returns what came of other counts."""
        return worked(self._rest, self._tolerance)

    def of_batch_loss(self, loss: LossFinding) -> str:
        """Returns what came of a loss over the whole batch's outputs."""
        if loss.output_gradients is None:
            return "not tried: what the loss is made of could not be told from the model's own outputs."
        of_sums = ' (combine="sum" is that with less memory)' if loss.shares is not None else ""
        return f"batch_loss= over the outputs{of_sums}: {worked(self._rest, self._tolerance)}"

    def of_coupled_loss(self, culprit: Culprit, own_loss: Substitutions) -> Culprit:
        """Returns the culprit; several means in one loss, or samples that only meet in groups, with lines for these."""
        try:
            found = self._diagnosis(own_loss)
        except Exception:  # noqa: BLE001  # the user's code, on rows that it was not made for
            return culprit
        if not found.instead or found.kind not in _TRIED_KINDS:
            return culprit
        lines = [", and ".join(entry.splitlines()) for entry in found.instead[:_MOST_LINES]]
        return replace(
            culprit,
            kind=_TRIED_KINDS[found.kind],
            what=f"{found.what}.",
            remedy=" Or: ".join(lines),
            price="nothing.",
            tried=f"it was run on the first {self._look_rows()} samples in several cuts, and was right on all.",
        )

    def _look_rows(self) -> int:
        return min(self._runs.task.rows, _MOST_LOOK_ROWS)

    def _diagnosis(self, own_loss: Substitutions) -> Diagnosis:
        rows = torch.arange(self._look_rows())
        first = -(-len(rows) * 5 // 8)

        def run_rows(chosen: Tensor) -> Run:
            piece = Piece(1, int(chosen[0]), int(chosen[0]) + 1, order=chosen)
            with self._runs.running(own_loss) as run:
                batch = run.cut(piece)
                parameters = [one for _, one in named_parameters(run.task.models) if one.requires_grad]
                return make_run(run.call(piece, batch), parameters, rows=chosen, batch=batch, in_full=True)

        parts = [run_rows(part) for part in (rows[:first], rows[first:])]
        return remedies(run_rows(rows), parts, run_rows, tolerance=self._tolerance)

    def _error(self, substitutions: Substitutions, cut: Sequence[Piece] | None = None) -> float:
        accumulated = self._runs.accumulated(cut or self._cut, substitutions)
        return relative_error(accumulated.gradients, self._runs.whole(substitutions).gradients)


def wide_sums_error(runs: Runs, cut: Sequence[Piece]) -> float:
    """Returns the error of gradients in the model's own dtype that are added up in float32."""
    wide = Substitutions(step_options={"accumulate_dtype": torch.float32})
    made = runs.in_own_dtype().accumulated(cut, wide)
    return relative_error(made.gradients, runs.accumulated(cut).gradients)
