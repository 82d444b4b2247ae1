"""Other people's trainers, made exact: one file or folder a framework, and `exact` for whatever is there already."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gradaccum.errors import UnsupportedError

_KINDS = {
    ("transformers", "Trainer"): "gradaccum.integrations.transformers",
    ("lightning", "Trainer"): "gradaccum.integrations.lightning",
    ("pytorch_lightning", "Trainer"): "gradaccum.integrations.lightning",
    ("accelerate", "Accelerator"): "gradaccum.integrations.accelerate",
}
"""By package and class of what is given: the module with its own ``exact``. None is imported before it is needed."""


def exact(thing: Any, **options: Any) -> Any:
    """Makes the updates of a trainer that is there already the whole batch's, and returns it.

    Args:
        thing: a ``transformers.Trainer`` or an instance of a derived class, a ``lightning.Trainer``, or an
            ``accelerate.Accelerator``.
        options: see ``exact`` in `gradaccum.integrations.transformers`, `.lightning` and `.accelerate`.

    Raises:
        UnsupportedError: it is none of these, or its gradients cannot be made exact.
    """
    for cls in type(thing).__mro__:
        module = _KINDS.get((cls.__module__.partition(".")[0], cls.__name__))
        if module is not None:
            return import_module(module).exact(thing, **options)
    raise UnsupportedError(
        f"exact() got a {type(thing).__module__}.{type(thing).__name__}, which is neither a transformers Trainer, a "
        "Lightning Trainer nor an Accelerator, so it is not known where its gradients add up. In a loop of your own "
        "use ga.Accumulator; in somebody else's, ga.Window."
    )
