"""Networks that a loss function runs and the step does not own: a discriminator, a teacher, a loss with a state.

They are found by running the whole batch once and looking at every module that is called. What they hold is part of
the answer: a BatchNorm in a discriminator couples samples like one in the model, and its statistics are put back.

Not seen: layers that are no modules, and modules that run without being called (``module.forward(x)``).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradaccum import tree
from gradaccum.checking.isolate_state import isolated_state
from gradaccum.checking.pieces import copied
from gradaccum.fit.borrowed_model import on_copies
from gradaccum.fit.workload import Workload


def outside_modules(workload: Workload, model: Any) -> dict[str, nn.Module]:
    """Returns the outermost modules with parameters or buffers that run and are none of the models', by name.

    The name is that of the variable by which a function of the user's holds the module, or else its class's.
    """
    known = {id(module) for one in workload.models for module in one.modules()}
    names = _names_in(workload.loss_fn, workload.forward, workload.batch_loss)
    found: dict[int, nn.Module] = {}
    thread = threading.get_ident()
    with ExitStack() as undone:
        undone.enter_context(isolated_state(workload.models))

        def before(module: nn.Module, args: Any) -> None:
            if id(module) in known or threading.get_ident() != thread:
                return
            outermost = next((one for _, one in names if any(module is part for part in one.modules())), module)
            known.update(map(id, outermost.modules()))
            if any(True for _ in _tensors(outermost)):
                found[id(outermost)] = outermost
                undone.enter_context(on_copies([outermost]))

        # For the time of one forward: there is no other way to see modules that nobody has named.
        undone.callback(register_module_forward_pre_hook(before).remove)
        with suppress(Exception), torch.no_grad():  # a mistake of the user's own comes again in the first run
            batch = copied(tree.to_device(workload.batch, workload.device))
            function: Any = workload.loss_fn or workload.forward
            made = function(model, batch)
            if workload.batch_loss is not None:
                workload.batch_loss(made, batch)
    named: dict[str, nn.Module] = {}
    for module in found.values():
        name = next((name for name, one in names if one is module), type(module).__name__)
        named[name if name not in named else f"{name} ({len(named)})"] = module
    return named


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _names_in(*functions: Callable[..., Any] | None) -> list[tuple[str, nn.Module]]:
    """Modules that functions hold by a variable: of the enclosing function, global, an argument, or of their object."""
    held: list[tuple[str, Any]] = []
    for function in functions:
        while hasattr(function, "func"):  # functools.partial
            partial: Any = function
            held += [*partial.keywords.items(), *((type(value).__name__, value) for value in partial.args)]
            function = partial.func
        owner = getattr(function, "__self__", function)
        held += vars(owner).items() if hasattr(owner, "__dict__") and not inspect.isfunction(owner) else []
        code: Any = inspect.unwrap(function) if callable(function) else None
        code = getattr(code, "__func__", code)
        if inspect.isfunction(code):
            variables = inspect.getclosurevars(code)
            held += [*variables.nonlocals.items(), *variables.globals.items()]
            held += [(name, one.default) for name, one in inspect.signature(code).parameters.items()]
    return [(name, value) for name, value in held if isinstance(value, nn.Module)]
