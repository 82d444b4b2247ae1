"""The user's own modules on copies of their tensors, for one run: nothing that happens in it is left behind.

Nothing is deep-copied, so models that cannot be are no exception, and a loss function that holds on to a part of the
model sees the copies as well. See `planning.borrowed` for what is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.auditing.in_double import in_double
from gradaccum.fit.borrowed_model import borrowed

# What nn.Module keeps for itself: tensors in it are replaced by `borrowed`, or there are none.
_OWN = frozenset(vars(nn.Module()))


@contextmanager
def on_copies(models: Sequence[nn.Module], *, is_double: bool) -> Iterator[None]:
    """Every parameter and buffer a copy, in float64 or as it is, and afterwards everything back as it was."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if type(tensor) is nn.Parameter:
            data = tensor.detach().clone()
            made: Tensor = nn.Parameter(in_double(data) if is_double else data, requires_grad=tensor.requires_grad)
            vars(made).update(vars(tensor))
        elif isinstance(tensor, nn.Parameter):  # of a class of its own: quantised, sharded
            made = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        else:
            made = tensor.detach().clone()
            made = in_double(made) if is_double else made
        copies[id(tensor)] = made
        return made

    default = torch.get_default_dtype()
    with borrowed(models, [], copy):
        _replace_references(models, copies)
        try:
            if is_double:
                torch.set_default_dtype(torch.float64)
            yield
        finally:
            torch.set_default_dtype(default)


def _replace_references(models: Sequence[nn.Module], copies: dict[int, Tensor]) -> None:
    """What modules hold under other names as well: the flat weights of recurrent layers, a tied weight in a list."""
    for module in {id(module): module for model in models for module in model.modules()}.values():
        attributes: dict[str, Any] = vars(module)
        for name, value in list(attributes.items()):
            if name not in _OWN:
                replaced = _replaced(value, copies)
                if replaced is not value:
                    attributes[name] = replaced


def _replaced(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if type(value) in (list, tuple):
        made = [_replaced(entry, copies) for entry in value]
        return value if all(one is other for one, other in zip(made, value, strict=True)) else type(value)(made)
    if type(value) is dict:
        made = {key: _replaced(entry, copies) for key, entry in value.items()}
        return value if all(made[key] is entry for key, entry in value.items()) else made
    return value
