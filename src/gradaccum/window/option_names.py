"""Options that there are not, and arguments too many: what was probably meant is named.

People come from other libraries, whose options have other names, and hand a number of steps over by place. Python's own
TypeError says that there is a mistake; which of the options it should have been decides how large an update is.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from gradaccum.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")

COUNTS = "lambda batch: (batch[1] != -100).sum()"
"""An example of ``weights=``."""

OTHER_NAMES = {
    **dict.fromkeys(
        (
            "accum_iter", "accum_steps", "accumulation_steps", "accumulate_steps", "accumulate_grad_batches",
            "grad_accum_steps", "gradient_accumulation_steps", "num_micro_batches", "num_steps", "steps",
        ),
        ("micro_batches", "micro_batch_size"),
    ),
    **dict.fromkeys(("max_norm", "max_grad_norm", "gradient_clip_val", "clip", "grad_clip"), ("clip_norm",)),
    **dict.fromkeys(("lr_scheduler", "schedulers", "schedule"), ("scheduler",)),
    **dict.fromkeys(("grad_scaler", "amp_scaler"), ("scaler",)),
    **dict.fromkeys(("batch_size", "microbatch_size", "micro_batch"), ("micro_batch_size", "batch_size")),
    **dict.fromkeys(("drop_last",), ("tail",)),
    **dict.fromkeys(("criterion", "loss", "loss_function"), ("loss_fn",)),
}  # fmt: skip
"""What others, and beginners, call an option; the first of its names here that the function has is meant."""


def explains_arguments(by_place: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: arguments that do not fit a function's signature are an `OptionError`.

    Args:
        by_place: what to write in place of the first argument that is one too many; "{}" is where it stands.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise OptionError(_explanation(function, signature, args, kwargs, by_place, error)) from None
            return function(*args, **kwargs)

        return checked

    return decorate


def check_flag(name: str, value: Any) -> None:
    """Checks an option that is true or false.

    Raises:
        OptionError: it is another value, "no" for example, which Python takes for true.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is of type {type(value).__name__}; it is an option to be True or False.")


def check_function(name: str, value: Any, example: str) -> None:
    """Checks an option that is a function or None; ``example`` is one.

    Raises:
        OptionError: it is something else.
    """
    if value is not None and not callable(value):
        raise OptionError(
            f"{name}={value!r} is of type {type(value).__name__}; it is a function. Pass {name}={example}."
        )


def _explanation(
    function: Callable[..., Any],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    by_place: str,
    error: TypeError,
) -> str:
    name = f"ga.{function.__qualname__.removesuffix('.__init__')}"
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    places = [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds]
    unknown = [option for option in kwargs if option not in signature.parameters]
    if unknown:
        return f"{name} has no option {unknown[0]}=. {_meant(unknown[0], kwargs[unknown[0]], signature)}"
    if len(args) > len(places):
        shown = _short(args[len(places)])
        given = [one for one in places if one != "self"]
        return (
            f"{name} takes {', '.join(given)} by place, and there is one argument more, {shown}. What it means "
            f"would be a guess. {by_place.format(shown)}"
        )
    return f"{name}: {error}. Its arguments are {name}({', '.join(one for one in places if one != 'self')}, ...)."


def _meant(option: str, value: Any, signature: inspect.Signature) -> str:
    options = [name for name in signature.parameters if name != "self"]
    found = next((name for name in OTHER_NAMES.get(option, ()) if name in options), None)
    if found is None:
        close = difflib.get_close_matches(option, options, n=1)
        return f"Did you mean {close[0]}=?" if close else f"It has {', '.join(f'{one}=' for one in options)}."
    if found == "micro_batches":
        return (
            f"Write micro_batches={_short(value)}, of the loader's items in an update, or batch_size=, a number of "
            "samples."
        )
    if found == "micro_batch_size":
        return (
            "The batch is what each call is given, however large; micro_batch_size= is how many of its samples one "
            'forward sees, or "auto".'
        )
    return f"Did you mean {found}=?"


def _short(value: Any) -> str:
    """The value as it would be typed; of what would fill the screen, the kind."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
