"""The errors for batches that cannot be read: parts that disagree, and lists that can be read in two ways."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradaccum.errors import BatchError
from gradaccum.tree.parts import Part, name_of, rows_as_columns

_GRID = 2  # dimensions of a table with the sizes of each sample's grid


def rows_disagree(first: Part, odd: Part, *, of: Part | None = None, parts: Sequence[Part] = ()) -> BatchError:
    """The error for two parts that cannot be of the same samples.

    ``of`` is the list that the second is in; ``parts`` are those in which counts of its rows may be found.
    """
    name = name_of((odd if of is None else of).path)
    count = first.length if first.count is None else first.count
    as_list = f" As a list of samples, {of.code} has {of.length}." if of is not None and of.inner else ""
    code = next((code for part in parts if (code := _code_of_counts(part, count, odd.count)) is not None), None)
    counts = "counts}, with counts(batch)" if code is None else f"lambda batch: {code}}}"
    return BatchError(
        f"Rows disagree: {first.code} has {count} and {_described(odd)}.{as_list} Cut along index 0, samples would be "
        f"paired with the wrong targets. Say how {name!r} belongs to the samples: split=ga.split_by_samples(axes="
        f"{{{name!r}: None}}) if all samples share it, {{{name!r}: 1}} if they lie along dimension 1, {{{name!r}: "
        f"{counts} for how many of its rows each sample has; or split=ga.split_packed() for packed "
        "sequences. In your own loop nothing is cut, and samples=lambda batch: ... counts them."
    )


def _code_of_counts(part: Part, samples: int | None, rows: int | None) -> str | None:
    """Code for a part's whole numbers, one for each sample, that add up to so many rows: lengths, or patch grids."""
    value = part.value
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() > _GRID:
        return None
    if value.shape[:1] != (samples,):
        return None
    counts = value if value.dim() == 1 else value.prod(1)
    return f"{part.code}{'' if value.dim() == 1 else '.prod(1)'}" if int(counts.sum()) == rows else None


def two_readings(part: Part) -> BatchError:
    """The error for a list whose entries may be samples, and may be columns.

    In ``axes`` a list's dimension 0 are its entries, and dimension 1 is that of the tensors in it.
    """
    name, kind = name_of(part.path), type(part.value).__name__
    rows = " or ".join(map(str, sorted(rows_as_columns(part), key=str)))
    return BatchError(
        f"{part.code} is a {kind} of {part.length} tensors that have {rows} rows each: {part.length} samples, or "
        f"{part.length} columns of {rows} samples? Cut the wrong way, parts of one sample would be taken for another. "
        f"Say which: split=ga.split_by_samples(axes={{{name!r}: 0}}) for a {kind} of samples, {{{name!r}: 1}} for "
        "columns. In your own loop nothing is cut, and samples=lambda batch: ... counts them."
    )


def _described(part: Part) -> str:
    shape = getattr(part.value, "shape", None)
    count = part.length if part.count is None else part.count
    return f"{part.code} has {count}" + (f" (shape {tuple(shape)})" if shape is not None else "")
