"""The public names, written out once more: adding or losing one is a decision, never an accident."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import gradaccum as ga
from gradaccum import errors

PUBLIC = {
    # the two ways to train, and what they give
    "Accumulator", "TrainStep", "Update",
    # several processes, and going on after a stop
    "GlobalBatchSampler", "Checkpoint", "RankError",
    # losses
    "Loss", "criterion", "chunked", "chunked_head",
    # how a batch is cut
    "split_by_cost", "split_by_samples", "split_packed", "split_as_given", "Split",
    # loops that step themselves
    "Window", "weight_of",
    # layers and losses over the batch
    "GhostBatch", "gather", "balance_over_batch",
    # what fits, and a training run for the command line
    "Plan", "plan", "Job", "advise",
    # is it exact
    "audit", "Report", "Culprit",
    # errors
    "GradAccumError", "LossError", "MeanError", "UnknownLossError", "BatchError", "WindowError", "ParameterError",
    "OptionError", "MisuseError", "StateError", "InexactError", "UnsupportedError", "MissingExtraError",
    # warnings
    "GradAccumWarning", "BatchNormWarning", "DiscardedWindowWarning", "DoesNotFitError", "ReplayError",
}  # fmt: skip


def test_the_list_is_the_one_in_the_package() -> None:
    assert set(ga.__all__) == PUBLIC
    assert len(ga.__all__) == len(set(ga.__all__))


def test_nothing_else_shows() -> None:
    shown = {name for name in dir(ga) if not name.startswith("_") and not inspect.ismodule(getattr(ga, name))}
    assert shown == PUBLIC


def test_every_error_is_public_and_derives_from_one_base() -> None:
    defined = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined.keys() <= PUBLIC
    for name, value in defined.items():
        assert issubclass(value, ga.GradAccumWarning if name.endswith("Warning") else ga.GradAccumError), name


def test_every_public_name_is_documented() -> None:
    missing = [where for name in sorted(PUBLIC) for where in undocumented(name, getattr(ga, name))]
    assert not missing, f"without a docstring of their own: {missing}"


def undocumented(name: str, value: Any) -> Iterator[str]:
    """`name`, and for a class every public method and property of its own, that has no docstring of its own."""
    if not inspect.isclass(value):
        if not inspect.getdoc(value):
            yield name
        return
    text = vars(value).get("__doc__") or ""
    if not text or text.startswith(f"{value.__name__}("):  # what dataclass writes when there is none
        yield name
    for key, member in vars(value).items():
        is_member = isinstance(member, types.FunctionType | property | staticmethod | classmethod)
        if not key.startswith("_") and is_member and not member.__doc__:
            yield f"{name}.{key}"


def test_the_docstring_guard() -> None:
    from dataclasses import dataclass

    class Documented:
        """Yes."""

        def method(self) -> None: ...

        def other(self) -> None:
            """Yes."""

        @property
        def value(self) -> int:
            return 1

        def _private(self) -> None: ...

    class Inherits(Documented):
        pass

    @dataclass
    class Data:
        x: int

    def function() -> None: ...

    assert list(undocumented("Documented", Documented)) == ["Documented.method", "Documented.value"]
    assert list(undocumented("Inherits", Inherits)) == ["Inherits"]
    assert list(undocumented("Data", Data)) == ["Data"]
    assert list(undocumented("function", function)) == ["function"]
