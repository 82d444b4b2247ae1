"""The surroundings of a run: nothing of it is left behind, and nothing that would hide a fault is in its way.

Parameters and buffers are copies, and random state, attributes and modes (train or eval) of every module come back (see
`on_copies`). Compiled models run eagerly and attention without fused kernels, since both draw random numbers where no
dispatch mode sees them. Warnings and the logger of the library are silent: what training reports, an audit reports in
words of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradaccum.checking.compare import Buffers
from gradaccum.checking.one_look import one_look
from gradaccum.fit.borrowed_model import on_copies


@contextmanager
def isolated_state(models: Sequence[nn.Module], *, cast: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Context manager in which models run on copies of their tensors, as they are or ``cast`` to another dtype."""
    is_compiled = any(type(module).__name__ == "OptimizedModule" for model in models for module in model.modules())
    with ExitStack() as stack:
        stack.enter_context(one_look(runs_eagerly=is_compiled))
        stack.enter_context(on_copies(models, cast=cast))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def copy_state(modules: Mapping[str, nn.Module]) -> Buffers:
    """Returns copies of all buffers and parameters; one of several modules counts under its first name."""
    first: dict[int, tuple[tuple[str, str], Tensor]] = {}
    for where, module in modules.items():
        for name, tensor in chain(module.named_buffers(recurse=False), module.named_parameters(recurse=False)):
            first.setdefault(id(tensor), ((where, name), tensor))
    return {key: tensor.detach().clone() for key, tensor in first.values()}


def put_state(modules: Mapping[str, nn.Module], state: Buffers) -> None:
    """Puts a state back, as `copy_state` returned it."""
    for (where, name), tensor in state.items():
        parameter = modules[where]._parameters.get(name)
        if parameter is None:  # a graph may need the buffer that is there
            modules[where]._buffers[name] = tensor.clone()
        elif not torch.equal(parameter, tensor):  # which a forward has written; optimizers know it by its identity
            parameter.data.copy_(tensor)
