"""The user's model for a while, with everything put back as it was, also after an error.

The modules themselves run, since a loss function may hold on to parts of them and not every model can be deep-copied,
but with stand-ins in place of their tensors: other parameters on the same memory where something is measured, fake ones
where it is estimated, copies where it is audited. So no gradient reaches the user's parameters, none of their hooks
runs, and the buffers that are written are copies.

What is put back besides: every attribute of every module and what lists and dicts among them hold (a mask that the
first forward keeps for the next ones must not remain, least of all a fake one), gradients, the random state of torch,
Python and numpy, and torch.Generators of the modules. What is not: objects of the user's own that the forward changes,
and what a loss function leaves in variables of its own.
"""

from __future__ import annotations

import builtins
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradaccum.memory.live_bytes import storages_in
from gradaccum.window.snapshot import RandomState

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
# Buffers up to here are copied: the kernels of BatchNorm write theirs without saying so. Larger ones (a quantised
# model's frozen weights) are watched, and saved when an operation writes them.
_MOST_COPIED_BYTES = 16 * 2**20
# What nn.Module keeps for itself: tensors in it are replaced by `borrowed`, or there are none.
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


@contextmanager
def borrowed(
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    stand_in: Callable[[Tensor], Tensor],
    *,
    everywhere: bool = False,
) -> Iterator[None]:
    """Context manager that puts a stand-in in the place of every parameter and buffer, and afterwards everything back.

    Optimizers are not touched, and their parameters keep their gradients. With ``everywhere`` what modules hold under
    other names is replaced too, which is needed where stand-ins have other values: the flat weights of recurrent
    layers, a tied parameter in a list.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    with ExitStack() as undone:
        undone.callback(torch.clear_autocast_cache)  # casts of stand-ins, if the caller has autocast on
        undone.callback(RandomState.now().restore)
        undone.callback(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            undone.callback(numpy.random.set_state, numpy.random.get_state())
        of_modules = [p for module in modules for p in module._parameters.values() if p is not None]
        # Optimizers may train some that no module has.
        of_optimizers = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        for parameter in {id(p): p for p in [*of_modules, *of_optimizers]}.values():
            undone.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        remembered: set[int] = set()
        for module in modules:
            remember(vars(module), remembered, undone)
        replaced: dict[int, Tensor] = {}
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in replaced:
                            replaced[id(tensor)] = stand_in(tensor)
                        tensors[name] = replaced[id(tensor)]  # pyright: ignore[reportArgumentType]
        if everywhere:
            for module in modules:
                own = {name: value for name, value in vars(module).items() if name not in _OWN_ATTRIBUTES}
                vars(module).update(_replaced(own, replaced))
        with torch.inference_mode(False), torch.enable_grad():
            yield


def sharing_memory(tensor: Tensor) -> Tensor:
    """A stand-in that computes the same: a parameter on the same memory, a buffer on memory of its own if it is small.

    Parameters of a class of their own (quantised, sharded) stay what they are: what they carry is not known here.
    """
    if type(tensor) is nn.Parameter:
        return _like(tensor, tensor.detach())
    if isinstance(tensor, nn.Parameter) or tensor.nbytes > _MOST_COPIED_BYTES:
        return tensor
    return tensor.detach().clone()


@contextmanager
def on_copies(models: Sequence[nn.Module], *, cast: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Context manager in which every parameter and buffer is a copy, and afterwards everything is back as it was.

    A ``cast`` changes their dtype and torch's default dtype; parameters of a class of their own are not cast.
    """

    def copied(tensor: Tensor) -> Tensor:
        data = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:
            return data.requires_grad_(tensor.requires_grad)
        data = data if cast is None else cast(data)
        return _like(tensor, data) if isinstance(tensor, nn.Parameter) else data

    default = torch.get_default_dtype()
    with borrowed(models, [], copied, everywhere=True):
        try:
            torch.set_default_dtype(default if cast is None else cast(torch.empty(0)).dtype)
            yield
        finally:
            torch.set_default_dtype(default)


def _like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter of other data, with the attributes of the first."""
    made = nn.Parameter(data, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _replaced(value: Any, replaced: dict[int, Tensor]) -> Any:
    """A value with stand-ins for the tensors in it; the same object where there are none."""
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if type(value) not in (list, tuple, dict):
        return value
    entries = value.values() if isinstance(value, dict) else value
    made = [_replaced(entry, replaced) for entry in entries]
    if all(one is other for one, other in zip(made, entries, strict=True)):
        return value
    return dict(zip(value, made, strict=True)) if isinstance(value, dict) else type(value)(made)


class SavedBeforeWriting(TorchDispatchMode):
    """Saves a tensor's memory right before an operation writes it, and puts it back at the end.

    A forward may write parameters: the average of a teacher, the vectors of a codebook. Copying all of them ahead
    would take the memory that is to be measured. It sees what operations declare to write, in this thread and in
    backward. It may be entered again: what was saved once is put back at every end.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._watched = {id(storage): storage for storage in storages_in(tensors)}
        self._saved: dict[int, UntypedStorage] = {}

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """Saves these too, from now on."""
        self._watched.update((id(storage), storage) for storage in storages_in(tensors))

    @property
    def has_saved(self) -> bool:
        """Whether anything was written."""
        return bool(self._saved)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for key, saved in self._saved.items():
            self._watched[key].copy_(saved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            given = [*zip(schema.arguments, args, strict=False)]
            given += [(one, (kwargs or {}).get(one.name)) for one in schema.arguments[len(args) :]]
            for declared, value in given:
                if declared.alias_info is not None and declared.alias_info.is_write:
                    for storage in storages_in(value):
                        if id(storage) in self._watched and id(storage) not in self._saved:
                            self._saved[id(storage)] = storage.clone()
        return func(*args, **(kwargs or {}))


def remember(value: Any, remembered: set[int], undone: ExitStack) -> None:
    """Has ``undone`` put back what a container holds, and what built-in containers in it hold, at any depth."""
    if isinstance(value, torch.Generator):
        undone.callback(value.set_state, value.get_state())
    elif type(value) in _CONTAINERS and id(value) not in remembered and not is_namespace(value):
        remembered.add(id(value))
        undone.callback(_refill, value, value.copy())
        for entry in value.values() if isinstance(value, dict) else value:
            remember(entry, remembered, undone)


def is_namespace(value: Any) -> bool:
    """Whether a dict holds the names of running code, or of Python itself: emptied, nothing would run any more."""
    if type(value) is not dict:
        return False
    return value is sys.modules or value is vars(builtins) or "__builtins__" in value


def _holds_same(container: Any, entries: Any) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(container) != len(entries):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), entries.items(), strict=True)
        return all(key is other and value is held for (key, value), (other, held) in pairs)
    if isinstance(container, (list, deque)):
        return all(one is other for one, other in zip(container, entries, strict=True))
    return {id(one) for one in container} == {id(one) for one in entries}


def _refill(container: Any, entries: Any) -> None:
    if _holds_same(container, entries):
        return
    container.clear()
    container.extend(entries) if isinstance(container, (list, deque)) else container.update(entries)
