"""A run of the user's own model and loss that leaves nothing behind.

Unlike an audit, which runs on copies, this runs on the user's own tensors: a loss function may hold on to parameters,
and a look before training has to see what training sees. Put back are parameters and buffers, gradients, attributes of
modules and what containers in them hold, modes, random state (torch, Python, NumPy, and generators within reach), and
what functions hold in their closures: lists, counters, attributes of callable objects. Networks that are not among the
models are found where a function holds them, and by a hook when they are called.

Not put back: what is out of reach from there (a file, a counter in another module's globals), and memory that kernels
write without saying so, in tensors of more than 16 MiB.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradaccum.checking.one_look import is_within, one_look
from gradaccum.fit.borrowed_model import SavedBeforeWriting, is_namespace, remember
from gradaccum.memory.live_bytes import tensors_in
from gradaccum.window.snapshot import RandomState

_MOST_COPIED_BYTES = 16 * 2**20  # buffers up to here are copied; larger ones are saved when an operation writes them
_MOST_ENTRIES = 10_000  # of a container in a closure: more are data, no counters
_MOST_VISITED = 1_000  # objects that are reached through functions
_HELD = (nn.Module, Tensor, torch.Generator, list, dict, random.Random, functools.partial)
_ITERATORS = (itertools.count, type(iter(range(0))), type(iter([])), type(iter(())))  # that can be copied
_LIBRARIES = ("torch", "numpy", "gradaccum")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


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
        self._visited: set[int] = set()
        for i, model in enumerate(models):
            self.add(model, f"{i}" if len(models) > 1 else "")
        self.own = frozenset(self.modules)
        for function in functions:
            self._add_object(function, "")
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
            for held, value in vars(module).items():
                if isinstance(value, Tensor):  # a queue, say, that is no buffer
                    self._before[id(module), held] = value, _version(value)
                elif _draws(value):
                    self._add_object(value, "")
            self._saved.watch(tensors_in(_attributes(module)))
            for hooks in _hooks_of(module):
                for hook in list(hooks.values()):
                    self._add_object(hook, "")

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
                self._add_object(hook, "")

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

    def _add_object(self, value: Any, name: str) -> None:
        """What a function, or an object that is called like one, holds and may change."""
        if isinstance(value, _SIMPLE) or id(value) in self._visited or len(self._visited) > _MOST_VISITED:
            return
        self._visited.add(id(value))
        if isinstance(value, nn.Module):
            self.add(value, name)
        elif isinstance(value, torch.Generator):
            remember(value, self._remembered, self._undone)
        elif isinstance(value, random.Random):
            self._undone.callback(value.setstate, value.getstate())
        elif _draws(value):
            state = value.bit_generator.state
            self._undone.callback(setattr, value.bit_generator, "state", state)
        elif isinstance(value, Tensor):
            self._saved.watch([value])
        elif isinstance(value, (list, dict, set)):
            if len(value) <= _MOST_ENTRIES and not is_namespace(value):
                remember(value, self._remembered, self._undone)
                for entry in list(value.values() if isinstance(value, dict) else value):
                    self._add_object(entry, name)
        elif isinstance(value, functools.partial):
            for held in (value.func, *value.args, *value.keywords.values()):
                self._add_object(held, name)
        elif inspect.ismethod(value):
            self._add_object(value.__func__, name)
            self._add_holder(value.__self__, name)
        elif inspect.isfunction(value):
            self._add_function(value)
        elif _is_of_the_user(value):
            self._add_holder(value, name)

    def _add_holder(self, holder: Any, name: str) -> None:
        """An object with methods: its attributes, and what containers among them hold."""
        if isinstance(holder, nn.Module):
            self._add_object(holder, name)
        elif hasattr(holder, "__dict__") and not isinstance(holder, (type, Optimizer)):
            attributes = dict(vars(holder))
            self._undone.callback(_put_attributes_back, holder, attributes)
            for attribute, value in attributes.items():
                if isinstance(value, _ITERATORS):
                    vars(holder)[attribute] = copy.copy(value)
                elif isinstance(value, _HELD) or inspect.isroutine(value):
                    self._add_object(value, attribute)

    def _add_function(self, function: Any) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                held = cell.cell_contents
            except ValueError:  # empty still
                continue
            if isinstance(held, (*_SIMPLE, *_ITERATORS)):  # a counter that the function rebinds, or moves on
                self._undone.callback(setattr, cell, "cell_contents", held)
            if isinstance(held, _ITERATORS):
                cell.cell_contents = copy.copy(held)
            self._add_object(held, name)
        self._add_defaults(function)
        if (function.__module__ or "").partition(".")[0] not in ("torch", "gradaccum"):
            for name in function.__code__.co_names:
                if name in function.__globals__:
                    held = function.__globals__[name]
                    if isinstance(held, _ITERATORS):
                        self._undone.callback(function.__globals__.__setitem__, name, held)
                        function.__globals__[name] = copy.copy(held)
                    self._add_object(held, name)

    def _add_defaults(self, function: Any) -> None:
        """What a function holds as the defaults of its arguments: ``def loss_fn(model, batch, judge=judge)``."""
        positional, by_name = function.__defaults__ or (), function.__kwdefaults__ or {}
        if any(isinstance(held, _ITERATORS) for held in positional):
            self._undone.callback(setattr, function, "__defaults__", positional)
            function.__defaults__ = tuple(
                copy.copy(held) if isinstance(held, _ITERATORS) else held for held in positional
            )
        code = function.__code__
        names = code.co_varnames[code.co_argcount - len(positional) : code.co_argcount]
        for name, held in (*zip(names, positional, strict=True), *by_name.items()):
            self._add_object(held, name)


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


def _draws(value: Any) -> bool:
    """Whether a value is a generator of Python's or NumPy's."""
    return isinstance(value, random.Random) or type(value).__module__ == "numpy.random._generator"


def _is_mere_count(module: nn.Module, name: str) -> bool:
    """Whether a buffer counts forwards and nothing comes of it: BatchNorm's, unless its average is cumulative."""
    return name == "num_batches_tracked" and getattr(module, "momentum", None) is not None


def _attributes(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]


def _hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [vars(module).get(name) or {} for name in names]


def _is_of_the_user(value: Any) -> bool:
    """Whether an object is of a class that no library known here has made; those hold threads, files and locks."""
    package = type(value).__module__.partition(".")[0]
    is_known = package in _LIBRARIES or package in sys.stdlib_module_names
    return hasattr(value, "__dict__") and not isinstance(value, type) and not is_known


def _put_attributes_back(holder: Any, attributes: dict[str, Any]) -> None:
    now = vars(holder)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _put_data_back(parameter: nn.Parameter, data: Tensor) -> None:
    if parameter.data_ptr() != data.data_ptr():
        parameter.data = data


def _put_values_back(tensor: Tensor, values: Tensor) -> None:
    # Bit by bit equal ones are left alone: writing moves their version, at which others look.
    if tensor.shape == values.shape and not torch.equal(tensor, values):
        with torch.no_grad():
            tensor.copy_(values)
