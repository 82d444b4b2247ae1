"""Remedies, run on the batch at hand before they are printed, and what came of it in words.

    batch-norm    the step's own options, with all other culprits taken out
    loss-weight   the counts found, as shares of the micro-batches
    coupled-loss  the whole batch's gradient on the outputs, as ``batch_loss=`` hands it on; groups that stay together
    buffer        the module in evaluation mode
    precision     gradients added up in float32

A change inside of a user's layer or function cannot be tried, and the report says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch

from gradaccum.auditing import culprits
from gradaccum.auditing.audit_run import Runs, Substitutions
from gradaccum.auditing.culprits import Culprit
from gradaccum.auditing.isolate_samples import is_batch_norm
from gradaccum.auditing.loss_shares import LossFinding
from gradaccum.checking.compare import different_buffers, relative_error
from gradaccum.checking.pieces import Piece, pieces, ragged_sizes
from gradaccum.split.by_samples import split_by_samples

CHANGES_CODE = "not tried: it changes code of yours."
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
        error, still_written = self._error(in_eval), different_buffers(
            self._runs.accumulated(self._cut, in_eval).state, self._runs.whole(in_eval).state, self._tolerance
        )  # fmt: skip
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
        return worked(self._rest, self._tolerance)

    def of_groups(self, culprit: Culprit, own_loss: Substitutions) -> Culprit:
        """Returns the culprit, with a split where micro-batches of whole groups of consecutive samples are exact."""
        rows = self._runs.task.rows
        if (
            self._runs.task.split != split_by_samples()
            or "groups" not in inspect.signature(split_by_samples).parameters
        ):
            return culprit
        for size in range(2, rows // 2 + 1):
            if rows % size:
                continue
            sizes = [size * groups for groups in ragged_sizes(rows // size, max(1, self._cut[0].rows // size))]
            try:
                error = self._error(own_loss, pieces(sizes))
            except Exception:  # noqa: BLE001  # code that cannot run these pieces
                continue
            if error <= self._tolerance:
                remedy = (
                    "ga.TrainStep(model, optimizer, loss_fn, split=ga.split_by_samples(groups=groups)), where "
                    f"groups(batch) returns torch.arange(rows) // {size}: every {size} samples in a row are compared "
                    "with each other, and with no others."
                )
                return replace(culprit, remedy=remedy, price="nothing.", tried=worked(error, self._tolerance))
        return culprit

    def _error(self, substitutions: Substitutions, cut: Sequence[Piece] | None = None) -> float:
        accumulated = self._runs.accumulated(cut or self._cut, substitutions)
        return relative_error(accumulated.gradients, self._runs.whole(substitutions).gradients)


def wide_sums_error(runs: Runs, cut: Sequence[Piece]) -> float:
    """Returns the error of gradients in the model's own dtype that are added up in float32."""
    wide = Substitutions(step_options={"accumulate_dtype": torch.float32})
    made = runs.in_own_dtype().accumulated(cut, wide)
    return relative_error(made.gradients, runs.accumulated(cut).gradients)
