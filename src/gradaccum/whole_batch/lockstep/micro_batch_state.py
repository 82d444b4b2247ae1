"""What belongs to one micro-batch in lockstep, while the process or the thread has but one of it.

A thread's state is carried into the threads of micro-batches, which start with gradients on, without autocast, on the
first device and its default stream, and with no modes or hooks. Carried are gradient mode, autocast with its dtypes,
CUDA device and stream, the default device, the number of threads, torch-function and dispatch modes, hooks on saved
tensors, and context variables. Anomaly mode and deterministic algorithms are the process's, and need no carrying. Not
carried: torch.profiler's recording, and modes of torch.func.

`Streams` and `Attributes` are switched whenever another micro-batch runs (`conductor.Switched`).
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn, overrides
from torch.utils import _python_dispatch as dispatch

from gradaccum.errors import UnsupportedError
from gradaccum.whole_batch.interception import Handlers, Replacement
from gradaccum.window.closures import is_torchs, place_of, uses_of
from gradaccum.window.snapshot import RandomState

Result = TypeVar("Result")

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def carry_thread_state(device: torch.device) -> Callable[[Callable[[], Result]], Result]:
    """What runs a function in another thread, which is to end then, under the calling thread's state of now."""
    scopes: list[Callable[[], AbstractContextManager[Any]]] = [
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled())
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        scopes.append(functools.partial(torch.cuda.device, torch.cuda.current_device()))
        scopes.append(functools.partial(torch.cuda.stream, torch.cuda.current_stream()))
    for kind in {"cpu", device.type}:
        if torch.is_autocast_enabled(kind):  # the context that nests: leaving an inner one keeps the outer one's cache
            dtype, is_cached = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            scopes.append(functools.partial(torch.autocast, kind, dtype=dtype, cache_enabled=is_cached))
    modes = overrides._get_current_function_mode_stack()
    scopes.append(functools.partial(_modes, modes, overrides._push_mode, overrides._pop_mode))
    modes = dispatch._get_current_dispatch_mode_stack()
    scopes.append(functools.partial(_modes, modes, dispatch._push_mode, dispatch._pop_mode))
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        scopes.append(functools.partial(torch.autograd.graph.saved_tensors_hooks, *hooks))
    device_context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    variables = contextvars.copy_context()

    def run(function: Callable[[], Result]) -> Result:
        # Has torch set this thread's number of OpenMP threads to that of `torch.set_num_threads`. It does so before its
        # own parallel loops, not before oneDNN's: a convolution would start as many as there are cores, and wait for
        # them: "exact" took 1.5 to 1.6 of the processor time of "micro" instead of 1.3 (32 channels, two cores).
        torch.get_num_threads()
        torch._GLOBAL_DEVICE_CONTEXT.device_context = device_context
        with ExitStack() as held:
            for scope in scopes:
                held.enter_context(scope())
            return function()

    return lambda function: variables.copy().run(run, function)


@contextmanager
def _modes(modes: Sequence[Any], push: Callable[[Any], None], pop: Callable[..., Any]) -> Iterator[None]:
    """Puts modes up that are up in another thread, without their ``__enter__``, which has been called there."""
    for mode in modes:
        push(mode)
    try:
        yield
    finally:
        for _ in modes:
            pop()


class Streams:
    """A random stream for each micro-batch, whoever runs between its draws.

    In lockstep the second micro-batch starts before the first has drawn its last number. So each draws from a stream of
    its own, seeded from the CPU's generator; and because a checkpoint puts back the state that its forward had found,
    the stream must not move while others run: the generators themselves are switched.

    Afterwards all generators are one number further, or untouched where nothing was drawn: what comes next does not
    depend on how the batch was cut. Python's and numpy's generators are not switched; micro-batches draw from them in
    the order in which they run, which is always the same.
    """

    def __init__(self, count: int) -> None:
        self._before = RandomState.now()
        self._seeds = self._before.next_numbers(count)
        self._states: dict[int, RandomState] = {}
        self._drew = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which the batch runs; on an error the generators are put back."""
        try:
            yield
        except BaseException:
            self._before.restore()
            raise

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Context manager in which the micro-batch of this index runs, until its next meeting."""
        if index in self._states:
            self._states[index].restore()
        else:
            self._before.seed(self._seeds[index])
            self._states[index] = RandomState.now()
        yield
        now = RandomState.now()
        self._drew = self._drew or not now.equals(self._states[index])
        self._states[index] = now

    def end(self) -> None:
        """Leaves the generators one number further; untouched, where no micro-batch drew anything."""
        self._before.advance(drew=self._drew)


class Attributes:
    """What modules keep on themselves during a forward, for each micro-batch.

    Between ``self.features = x`` in one layer and ``self.features`` in a later one, other micro-batches set it too, and
    the gradient would be wrong in silence. So attributes that are set while a micro-batch runs are put back when it
    goes on, and the last one's stay, as after a loop over the micro-batches.

    Seen is what is set through ``nn.Module.__setattr__``. Tensors changed in place, lists appended to, and what code
    keeps outside of modules (globals, the lists of forward hooks) is shared by all micro-batches.
    """

    def __init__(self, count: int) -> None:
        # Of each micro-batch, by id of the module and name.
        self._values: list[dict[tuple[int, str], tuple[nn.Module, Any]]] = [{} for _ in range(count)]

    def noted(self, index: int) -> AbstractContextManager[None]:
        """Context manager in which attributes that this thread sets are those of the micro-batch of this index."""
        return _setters.in_forward(functools.partial(self._note, index))

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Context manager in which the micro-batch of this index runs, until its next meeting."""
        values = self._values[index]
        for (_, name), (module, value) in values.items():
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        yield
        for (key, name), (module, _) in values.items():
            values[key, name] = module, module.__dict__.get(name, _MISSING)

    def _note(self, index: int, call: tuple[nn.Module, str]) -> None:
        module, name = call
        self._values[index][id(module), name] = module, _MISSING  # the value is noted when the micro-batch stops


_MISSING: Any = object()


def _setattr(module: nn.Module, name: str, value: Any) -> None:
    _set.original(module, name, value)
    if name in module.__dict__:  # neither parameter nor buffer nor module
        _setters.answer((module, name))


def _delattr(module: nn.Module, name: str) -> None:
    is_own = name in module.__dict__
    _delete.original(module, name)
    if is_own:
        _setters.answer((module, name))


# Replaced for the process, because nothing local sees that an attribute is set. Python looks `__setattr__` up on the
# class, never on the instance. Comparing `module.__dict__` before and after each switch sees changes, but not that a
# micro-batch has set the value that was there (another one's size, which then is not its own), cannot tell a counter
# that all share from a value of its own, and takes 140 us for 160 modules where the switch takes 15.
_setters = Handlers()
_set = Replacement(nn.Module, "__setattr__", _setattr)
_delete = Replacement(nn.Module, "__delattr__", _delattr)


@contextmanager
def attributes_seen() -> Iterator[None]:
    """Context manager in which modules say which attributes are set in threads with `Attributes.noted`."""
    with _set.held(), _delete.held():
        yield


def refuse_shared_hooks(models: Iterable[nn.Module], function: Callable[..., Any]) -> None:
    """Refuses forward hooks that put what they see where ``function``, which runs a micro-batch, takes it from.

    Between the hook and the taking, other micro-batches put theirs there.

    Raises:
        UnsupportedError: there is such a hook.
    """
    taken: set[int] | None = None
    for model in models:
        for name, module in model.named_modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if is_torchs(hook):
                    continue
                taken = uses_of(function).kept if taken is None else taken
                uses = uses_of(hook)
                if uses.puts and uses.kept & taken:
                    raise UnsupportedError(
                        f"The forward hook {place_of(hook)} on {name or type(module).__name__!r} keeps what it sees "
                        "where the loss takes it from, and in lockstep several micro-batches run side by side: the "
                        "loss of one would be of the features of another. Have the hook set an attribute of its "
                        "module, module.features = output, which each micro-batch has for itself, and take it from "
                        "there."
                    )
