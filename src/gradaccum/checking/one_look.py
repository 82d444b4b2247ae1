"""A look at the user's own model while other threads of the process may be training theirs.

Hooks on all modules and on all optimizers, the filters of warnings and a logger belong to the process, not to a thread.
So there is one look at a time: two that overlap would each put back what the other had set, and warnings would stay
silent for ever. A second one waits, for a forward or two. And a hook of a look asks whether it was called from within
it, since training in other threads goes on meanwhile: their modules are not to be put back, nor their optimizers
stopped.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

_ONE_AT_A_TIME = threading.RLock()  # one thread may look inside of its own look
# Carried into the threads of micro-batches that run in lockstep, and into no other.
_IS_WITHIN: ContextVar[bool] = ContextVar("gradaccum look", default=False)


@contextmanager
def one_look(*, runs_eagerly: bool) -> Iterator[None]:
    """Context manager for a look: the only one, in which warnings and the logger of the library are silent.

    Args:
        runs_eagerly: whether compiled models run as they are written.
    """
    logger = logging.getLogger("gradaccum")
    with _ONE_AT_A_TIME, ExitStack() as undone:
        undone.callback(_IS_WITHIN.reset, _IS_WITHIN.set(True))
        undone.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undone.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        if runs_eagerly and "torch._dynamo" in sys.modules:
            undone.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def is_within() -> bool:
    """Whether this code runs in the thread of a look, or in one that the look has started."""
    return _IS_WITHIN.get()
