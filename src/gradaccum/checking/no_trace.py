"""A run of the user's own model and loss that leaves nothing behind.

Unlike an audit, which runs on copies, this runs on the user's own tensors: a loss function may hold on to parameters,
and a look before training has to see what training sees. Put back are parameters and buffers, gradients, attributes of
modules and what containers in them hold, modes, random state (torch, Python, NumPy, and generators within reach), and
what functions hold in their closures: lists, counters, attributes of callable objects. Networks that are not among the
models are found where a function holds them, and by a hook when they are called.

What functions hold is found by `held_state`.

Not put back: what is out of reach from there (a file, a counter in another module's globals), and memory that kernels
write without saying so, in tensors of more than 16 MiB.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradaccum.checking.held_state import HeldState, is_numpys_generator
from gradaccum.checking.one_look import is_within, one_look
from gradaccum.fit.borrowed_model import SavedBeforeWriting, remember
from gradaccum.memory.live_bytes import tensors_in
from gradaccum.window.snapshot import RandomState

_MOST_COPIED_BYTES = 16 * 2**20  # buffers up to here are copied; larger ones are saved when an operation writes them
# Of all modules: torch keeps them in dicts that it binds once.
_GLOBAL_HOOKS: tuple[Callable[[], dict[int, Any]], ...] = (
    lambda: torch_modules._global_forward_hooks,
    lambda: torch_modules._global_forward_pre_hooks,
    lambda: torch_modules._global_backward_hooks,
)


class StepsInside(RuntimeError):
    """An optimizer steps in the forward or the backward, which cannot be taken back."""


class Watched:
    """What is put back at the end, and the modules that were met.

    Attributes:
        names: of every module met, by its id: qualified, after the variable that holds it where it is no model.
        modules: every module met, by its id; `models` come first.
        own: ids of the modules that belong to the step's models.
    """

    def __init__(self, models: Sequence[nn.Module], functions: Sequence[Any], undone: ExitStack) -> None:
        self.names: dict[int, str] = {}
        self.modules: dict[int, nn.Module] = {}
        self._undone = undone
        self._saved = SavedBeforeWriting([])
        # What forwards may change, as it was: copies of buffers, versions of the rest.
        self._before: dict[tuple[int, str], tuple[Tensor, Tensor | tuple[int, int]]] = {}
        self._remembered: set[int] = set()
        self._held = HeldState(undone, self._remembered, add_module=self.add, watch=self._saved.watch)
        for i, model in enumerate(models):
            self.add(model, f"{i}" if len(models) > 1 else "")
        self.own = frozenset(self.modules)
        for function in (*functions, *(hook for hooks in _GLOBAL_HOOKS for hook in hooks().values())):
            self._held.add(function, "")
        self._held.refuse_iterators()
        undone.enter_context(self._saved)

    def add(self, root: nn.Module, name: str) -> None:
        """Has a module, with all modules in it, put back at the end."""
        for inner, module in root.named_modules():
            if id(module) in self.modules:
                continue
            self.modules[id(module)] = module
            self.names[id(module)] = ".".join(part for part in (name, inner) if part) or type(module).__name__
            for held, parameter in module._parameters.items():
                if parameter is not None:
                    self._add_parameter(parameter)
                    self._before[id(module), held] = parameter, _version(parameter)
            for held, buffer in module._buffers.items():
                if buffer is not None:
                    before = self._add_buffer(buffer)
                    if not _is_mere_count(module, held):
                        self._before[id(module), held] = buffer, before
            remember(vars(module), self._remembered, self._undone)
            self._held.add_class(type(module))
            for held, value in vars(module).items():
                if isinstance(value, Tensor):  # a queue, say, that is no buffer
                    self._before[id(module), held] = value, _version(value)
                elif isinstance(value, random.Random) or is_numpys_generator(value):
                    self._held.add(value, "")
            self._saved.watch(tensors_in(_attributes(module)))
            for hooks in _hooks_of(module):
                for hook in list(hooks.values()):
                    self._held.add(hook, "")

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of what is put back."""
        return id(parameter) in self._remembered

    def _add_parameter(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._remembered:
            return
        self._remembered.add(id(parameter))
        self._undone.callback(setattr, parameter, "grad", parameter.grad)
        self._undone.callback(parameter.requires_grad_, parameter.requires_grad)
        if type(parameter) is nn.Parameter:
            self._undone.callback(_put_data_back, parameter, parameter.data)
        parameter.grad = None
        self._saved.watch([parameter])
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            for hook in list((hooks or {}).values()):
                self._held.add(hook, "")

    def _add_buffer(self, buffer: Tensor) -> Tensor | tuple[int, int]:
        if buffer.nbytes > _MOST_COPIED_BYTES:
            self._saved.watch([buffer])
            return _version(buffer)
        values = buffer.detach().clone()
        if id(buffer) not in self._remembered:
            self._remembered.add(id(buffer))
            self._undone.callback(_put_values_back, buffer, values)
        return values

    def changed(self) -> dict[tuple[int, str], Tensor]:
        """Copies of what has changed so far, and kept its shape, by module and name."""
        found: dict[tuple[int, str], Tensor] = {}
        for (key, name), (tensor, before) in self._before.items():
            now: Any = getattr(self.modules[key], name, None)
            if not isinstance(now, Tensor) or now.shape != tensor.shape or now.requires_grad != tensor.requires_grad:
                continue
            if isinstance(before, Tensor):
                is_changed = not torch.equal(now, before)
            else:
                is_changed = now is not tensor or _version(now) != before
            if is_changed:
                found[key, name] = now.detach().clone()
        return found


@contextmanager
def no_trace(models: Sequence[nn.Module], functions: Sequence[Any]) -> Iterator[Watched]:
    """Context manager in which models and functions may run, and after which everything is as it was.

    Parameters have no gradient inside. Compiled models run eagerly, so that nothing is compiled for the sizes of a
    look; warnings and the logger of the library are silent.

    Raises:
        StepsInside: an optimizer is about to step in it.
    """
    with ExitStack() as undone:
        undone.enter_context(one_look(runs_eagerly=True))
        undone.callback(torch.clear_autocast_cache)  # casts of what is put back
        undone.callback(RandomState.now().restore)
        undone.callback(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            undone.callback(numpy.random.set_state, numpy.random.get_state())
        watched = Watched(models, functions, undone)

        def met(module: nn.Module, _: Any) -> None:
            if id(module) not in watched.modules and is_within():
                watched.add(module, "")

        def steps(optimizer: Any, *_: Any) -> None:
            # A device's backward runs in a thread of torch's: an optimizer that steps in there is known by what it has.
            if is_within() or any(map(watched.has, _parameters_of(optimizer))):
                raise StepsInside(f"{type(optimizer).__name__} steps inside of it")

        undone.callback(register_optimizer_step_pre_hook(steps).remove)
        undone.callback(register_module_forward_pre_hook(met).remove)
        yield watched


def _parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or given other data."""
    return tensor._version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) else 0


def _is_mere_count(module: nn.Module, name: str) -> bool:
    """Whether a buffer counts forwards and nothing comes of it: BatchNorm's, unless its average is cumulative."""
    return name == "num_batches_tracked" and getattr(module, "momentum", None) is not None


def _attributes(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]


def _hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [vars(module).get(name) or {} for name in names]


def _put_data_back(parameter: nn.Parameter, data: Tensor) -> None:
    if parameter.data_ptr() != data.data_ptr():
        parameter.data = data


def _put_values_back(tensor: Tensor, values: Tensor) -> None:
    # Bit by bit equal ones are left alone: writing moves their version, at which others look.
    if tensor.shape == values.shape and not torch.equal(tensor, values):
        with torch.no_grad():
            tensor.copy_(values)
