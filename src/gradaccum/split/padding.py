"""Where a batch is padded: read from its values, and believed only where the costs of its samples agree.

Nothing in a batch says which dimension is padded, on which side, and up to where. A field whose last columns hold one
value may be padded there, or its samples may all end alike (in an end-of-text token); then trimming would drop real
columns from the gradient without a word. So four things have to come together:

1. **A claim.** Along a dimension of some width, each sample of a field ends (or, on the left, begins) in a run of one
   value: the one that the cheapest sample ends in, since it is padded most. The sample's length is what is left.
2. **A reason to believe it.** In every sample the length is the cost plus a constant that is not negative (a token more
   than there are targets, say), and the lengths differ. Or that holds for what is left of the costs after another
   width's lengths (source and target). Or the field is a mask of 0 and 1 that ranks the samples as the costs do
   (squares, seconds), or one under the name that Hugging Face gives it.
3. **No veto.** Every field is constant past the lengths along each dimension of that width, sample by sample, or is
   the same for all samples (positions, a causal mask). A field that is neither holds something real there.

4. **Together.** Where a field is the first or the last columns of a wider one (responses of ``input_ids``, a response
   mask of the attention mask), or is padded exactly as those would be, what is cut off at that side is cut off both, or
   neither: models and losses slice the one to fit the other.

A width that fails is left as it is on that side; so is one that only the costs call padded on both sides. Where costs
count real columns, a believed length is never below its cost, so nothing real is cut off on the padded side. On the
other side that would take samples that begin, or end, in runs of one value exactly as long as the costs suggest.
Whether the model looks at padding is not known here; see `split_by_cost`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gradaccum import tree
from gradaccum.types import Rows

MIN_RANKED = 4  # different lengths, and costs: in the same order by chance only once in 24, and then there is the veto
MIN_PADDED = 2  # columns: the last one alone is a run of one value in any sample
MASKS = ("attention_mask", "decoder_attention_mask")  # Hugging Face's: 1 is real, 0 is padding
CHUNK = 2**20  # elements compared at once: a square mask must not be there twice, nor leave the cache


class _Side(Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """The columns of a batch that are real, where the others are padding with certainty.

    Attributes:
        real: for each width that is padded: of each row the first real column, and the one after the last, ``[rows]``
            each.
        doubt: why a padding that seemed to be there is not believed; empty where there was none.
    """

    real: Mapping[int, tuple[Tensor, Tensor]]
    doubt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """The lengths of all samples, as one dimension of one field shows them."""

    field: Tensor
    dim: int
    side: _Side
    lengths: list[int]
    is_named: bool

    @property
    def width(self) -> int:
        return self.field.shape[self.dim]


def find_padding(batch: Any, costs: Sequence[float], layout: tree.Layout | None = None) -> Padding:
    """Reads where a batch of at least one row is padded, for every width it has, given the cost of each row.

    ``layout`` is how the batch has been read. A width that anything has whose samples are not along a dimension (what
    all share, lists, counted rows) is left as it is: whether that is padded too cannot be seen.

    On a device this synchronises a few times for each field.
    """
    fields, others = _fields(batch, tree.read(batch) if layout is None else layout)
    if fields is None:
        return Padding(real={}, doubt="the batch holds tensors that are not strided")
    claims = list(_claims(batch, fields, costs))
    believed: dict[tuple[int, _Side], list[_Claim]] = {}
    for claim in claims:
        others = [other for other in claims if other.width != claim.width]
        believed.setdefault((claim.width, claim.side), []).extend([claim] if _is_believed(claim, costs, others) else [])
    lengths: dict[tuple[int, _Side], list[int]] = {}
    doubt = ""
    for (width, side), here in believed.items():
        if width in others:
            doubt = doubt or f"{others[width]} has a dimension of {width} too, and no dimension of samples"
            continue
        if not here:
            doubt = doubt or f"the costs do not go with the lengths that are seen along a dimension of {width}"
            continue
        longest = [max(of_row) for of_row in zip(*(claim.lengths for claim in here), strict=True)]
        veto = _veto(fields, width, side, longest, here)
        if veto is None:
            lengths[width, side] = longest
        else:
            doubt = f"a field of shape {tuple(veto.shape)} is not constant where others are padded"
    for width in dict.fromkeys(width for width, _ in lengths):
        sides = [(width, side) for side in _Side]
        is_named = all(any(claim.is_named for claim in believed[side]) for side in sides if side in lengths)
        if all(side in lengths for side in sides) and not is_named:
            doubt = f"the costs go with lengths along a dimension of {width} from the left and from the right"
            lengths = {(other, side): longest for (other, side), longest in lengths.items() if other != width}
    while failed := _keep_together(fields, lengths):
        doubt = failed
    real: dict[int, tuple[Tensor, Tensor]] = {}
    for width in dict.fromkeys(width for width, _ in lengths):
        left, right = (torch.tensor(lengths.get((width, side), [width] * len(costs))) for side in _Side)
        real[width] = width - left, right
    return Padding(real=real, doubt=doubt)


def trimmed(batch: Any, rows: Rows, padding: Padding, layout: tree.Layout | None = None) -> Any:
    """Takes the given rows without the columns that are padding in all of them; at least one column stays."""
    layout = tree.read(batch) if layout is None else layout
    spans: dict[int, slice] = {}
    for width, (starts, stops) in padding.real.items():
        start = min(int(starts[rows].min()), width - 1)
        spans[width] = slice(start, max(int(stops[rows].max()), start + 1))

    def narrow(leaf: Any, along: int) -> Any:
        cut = [slice(None) if dim == along else spans.get(size, slice(None)) for dim, size in enumerate(leaf.shape)]
        return leaf[tuple(cut)] if len(leaf.shape) > 1 else leaf

    if isinstance(rows, slice):  # copied, as indices always are: a trimmed view is no longer contiguous
        rows = torch.arange(tree.rows_of(batch, layout))[rows]
    return tree.take(batch, rows, layout, before_cut=narrow)


def _fields(batch: Any, layout: tree.Layout) -> tuple[list[Tensor] | None, dict[int, str]]:
    """Every tensor and array with columns, samples first; None where one cannot be compared column by column.

    Also the widths that everything else has, with what has them.
    """
    others = {
        size: layout.codes[path]
        for path, part in layout.parts_of(batch)
        if not isinstance(layout.along[path], int)
        for tensor in tree.leaves(part)
        for size in getattr(tensor, "shape", ())
    }
    found = [
        (part, along)
        for path, part in layout.parts_of(batch)
        if isinstance(along := layout.along[path], int) and len(getattr(part, "shape", ())) > 1
    ]
    try:
        tensors = [
            # The same object where it can be: a mask is known by it.
            (tensor.movedim(along, 0) if along else tensor)
            for field, along in found
            for tensor in (field if isinstance(field, Tensor) else torch.tensor(field),)
        ]
    except (TypeError, ValueError):  # an array of strings, or of negative strides
        return None, others
    return (
        tensors if all(field.layout is torch.strided and not field.is_nested for field in tensors) else None
    ), others


def _dims(fields: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    for field in fields:
        yield from ((field, dim) for dim in range(1, field.dim()) if field.numel() and field.shape[dim] > 1)


def _claims(batch: Any, fields: Sequence[Tensor], costs: Sequence[float]) -> Iterator[_Claim]:
    cheapest = costs.index(min(costs))
    named = [batch[name] for name in MASKS if name in batch] if isinstance(batch, Mapping) else []
    for field, dim in _dims(fields):
        is_named = any(field is mask for mask in named) and _is_mask(field)
        for side in _Side:
            width = field.shape[dim]
            row = field[cheapest : cheapest + 1]
            if is_named:
                pad = field.new_zeros((1, 1, 1))
            elif int(_lengths(row, dim, side)) > width - MIN_PADDED:
                continue  # for most fields that are not padded, one row is enough to know
            else:
                pad = _outermost(_by_column(row, dim), side)
            lengths = _lengths(field, dim, side, pad).tolist()
            if min(lengths) < width:
                yield _Claim(field=field, dim=dim, side=side, lengths=lengths, is_named=is_named)


def _lengths(field: Tensor, dim: int, side: _Side, pad: Tensor | None = None) -> Tensor:
    """Counts the columns of each row, along ``dim``, that remain without the run of one column at its side.

    ``pad`` is the column that the run repeats, ``[1, 1, elements of a column]``; None for each row's own outermost one.
    """
    width = field.shape[dim]
    count = torch.arange(1, width + 1, dtype=torch.int32, device=field.device)
    if side is _Side.LEFT:
        count = count.flip(0)
    lengths: list[Tensor] = []
    for part in field.split(max(1, CHUNK * field.shape[0] // field.numel())):
        columns = _by_column(part, dim)
        differs = columns != (_outermost(columns, side) if pad is None else pad)
        differs = differs.view(torch.uint8).amax(2)  # a tenth of the time of any(2)
        lengths.append((differs * count).amax(1))
    return torch.cat(lengths)


def _by_column(field: Tensor, dim: int) -> Tensor:
    """``[rows, columns, elements of a column]``."""
    return field.movedim(dim, 1).reshape(field.shape[0], field.shape[dim], -1)


def _outermost(columns: Tensor, side: _Side) -> Tensor:
    return columns[:, -1 if side is _Side.RIGHT else 0, None]


def _is_mask(field: Tensor) -> bool:
    return field.dim() == 2 and (field.dtype == torch.bool or bool(((field == 0) | (field == 1)).all()))


def _is_believed(claim: _Claim, costs: Sequence[float], elsewhere: Sequence[_Claim]) -> bool:
    if claim.is_named or _is_explained(claim, costs) or _is_ranked(claim, costs):
        return True
    without = ([cost - length for cost, length in zip(costs, other.lengths, strict=True)] for other in elsewhere)
    return any(_is_explained(claim, rest) for rest in without)


def _is_explained(claim: _Claim, costs: Sequence[float]) -> bool:
    """Whether each length is min(cost + constant, width), the constant not negative; or 0, for an empty sample."""
    width, lengths = claim.width, claim.lengths
    inside = {length - cost for cost, length in zip(costs, lengths, strict=True) if 0 < length < width} or {0}
    constant = inside.pop()
    if inside or constant < 0:
        return False
    for cost, length in zip(costs, lengths, strict=True):
        if (length == width and cost + constant < width) or (length == 0 and cost > 0):
            return False
    # Empty samples are padding all over and prove nothing. Nor does one length: sequences that are alike end alike.
    filled = {length for length in lengths if length > 0}
    return len(filled) > 1 if constant == 0 else len(filled - {width}) > 2


def _is_ranked(claim: _Claim, costs: Sequence[float]) -> bool:
    """Whether a mask's lengths are in the order of the costs, which are not lengths themselves."""
    lengths = claim.lengths
    if min(len(set(lengths)), len(set(costs))) < MIN_RANKED or not _is_mask(claim.field):
        return False
    if max(costs) <= claim.width and any(length < cost for length, cost in zip(lengths, costs, strict=True)):
        return False
    ranked = [length for _, length in sorted(zip(costs, lengths, strict=True))]
    return ranked == sorted(ranked)


def _keep_together(fields: Sequence[Tensor], lengths: dict[tuple[int, _Side], list[int]]) -> str:
    """Gives widths of which one is a part of the other the same columns to lose at the side they share.

    Where that cannot be, takes both out of ``lengths`` at that side, and returns why; empty where all are together.
    """
    widths = sorted({field.shape[1] for field in fields if field.shape[1] > 1}, reverse=True)
    for side, wide, narrow in itertools.product(_Side, widths, widths):
        if narrow >= wide or ((wide, side) not in lengths and (narrow, side) not in lengths):
            continue
        of_part, of_wide = ([field for field in fields if field.shape[1] == width] for width in (narrow, wide))
        longest = lengths.get((wide, side), [wide] * len(fields[0]))
        needed = [max(length - (wide - narrow), 0) for length in longest]
        own = [_lengths(field, 1, side).tolist() for field in of_part if field.numel()]
        alike = len(set(needed)) > 2 and (wide, side) in lengths and needed in own
        if not alike and not any(_is_part(part, whole, side) for part in of_part for whole in of_wide):
            continue
        if (wide, side) not in lengths or any(any(map(operator.gt, of_field, needed)) for of_field in own):
            lengths.pop((wide, side), None)
            lengths.pop((narrow, side), None)
            return f"a dimension of {narrow} is a part of one of {wide}, and is not padded where that is"
        lengths[narrow, side] = needed
    return ""


def _is_part(part: Tensor, whole: Tensor, side: _Side) -> bool:
    """Whether a field is the outermost columns of a wider one, at this side."""
    width = part.shape[1]
    if part.shape[2:] != whole.shape[2:] or part.dtype.is_floating_point:
        return False
    columns = whole[:, -width:] if side is _Side.RIGHT else whole[:, :width]
    return bool((part == columns).all())


def _veto(
    fields: Sequence[Tensor], width: int, side: _Side, lengths: Sequence[int], believed: Sequence[_Claim]
) -> Tensor | None:
    """The first field of this width that is neither constant past the lengths nor the same for all samples."""
    for field, dim in _dims(fields):
        if field.shape[dim] != width or any(field is claim.field and dim == claim.dim for claim in believed):
            continue
        own = _lengths(field, dim, side)
        is_padded = bool((own <= torch.tensor(lengths, device=own.device)).all())
        if not is_padded and (len(set(lengths)) == 1 or not bool((field == field[:1]).all())):
            return field
    return None
