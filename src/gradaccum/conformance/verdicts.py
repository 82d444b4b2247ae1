"""A trainer in a scenario: exact, off by how much and why, or not offered; and the trainers that are known by name."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from gradaccum.conformance import oracle
from gradaccum.conformance.scenarios import Adapter, AdapterError, Scenario, Trained
from gradaccum.conformance.suite import scenarios
from gradaccum.report.machine import versions

Outcome = Literal["exact", "off", "error", "not offered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Somebody's trainer.

    Attributes:
        title: in the table.
        function: the adapter.
        imports: the lines of Python that make it ``train``.
    """

    title: str
    function: Adapter
    imports: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a trainer did.

    Attributes:
        error: see `oracle.error_of`; None where there was no training.
        reason: which known mistake gives just this result, or what was raised; None where it is not known.
        why: what a mean over micro-batches gets wrong in this scenario.
        reproduction: five lines of Python that print the error; empty unless the trainer is off or raised an error.
    """

    trainer: str
    scenario: str
    outcome: Outcome
    error: float | None
    reason: str | None
    why: str
    reproduction: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.outcome == "exact":
            return f"{self.scenario}: exact, {self.error:.0e} from the whole batch in float64"
        if self.outcome == "not offered":
            return f"{self.scenario}: not offered, {self.reason}"
        if self.outcome == "error":
            return f"{self.scenario}: {self.reason}"
        known = f" What it does: {self.reason}." if self.reason else " Which mistake it is was not found out."
        return f"{self.scenario}: off by {self.error:.1e}.{known} The difficulty: {self.why}."


def judge(scenario: Scenario, trainer: Trainer) -> Verdict:
    """Trains, and compares with the whole batch in float64.

    Raises:
        AdapterError: the adapter is none.
    """
    error: float | None = None
    reason: str | None = None
    outcome: Outcome = "not offered"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = scenario.train(trainer.function)
    except AdapterError:
        raise
    except NotImplementedError as refused:
        reason = str(refused)
    except Exception as raised:  # noqa: BLE001 - an adapter may raise anything, and the others' turn comes
        outcome, reason = "error", f"{type(raised).__name__}: {_first_sentence(raised)}"
    else:
        error = oracle.error_of(scenario, made, _right(scenario.name))
        outcome = "exact" if error <= oracle.EXACT else "off"  # a NaN is off
        reason = _reason(scenario, made) if outcome == "off" else None
    return Verdict(
        trainer=trainer.title,
        scenario=scenario.name,
        outcome=outcome,
        error=error,
        reason=reason,
        why=scenario.why,
        reproduction=_reproduction(scenario.name, trainer, error) if outcome in ("off", "error") else (),
    )


def _reason(scenario: Scenario, made: Trained) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loop with a mistake may be warned of it
        return oracle.reason(scenario, made)


def _reproduction(scenario: str, trainer: Trainer, error: float | None) -> tuple[str, ...]:
    case = f"case = conformance.scenario({scenario!r})"
    shown = "" if error is None else f"  # {error:.1e}"
    lines = ("from gradaccum import conformance", *trainer.imports, case)
    if len(trainer.imports) > 1:
        return (*lines, f"print(conformance.error_of(case, case.train(train))){shown}")
    whole = "whole = conformance.whole_batch(case)  # one backward a batch, in float64"
    return (*lines, whole, f"print(conformance.error_of(case, case.train(train), whole)){shown}")


def judge_all(trainers: Iterable[Trainer]) -> Iterator[Verdict]:
    """Each trainer in each scenario, scenario by scenario."""
    trainers = list(trainers)
    for scenario in scenarios():
        for trainer in trainers:
            yield judge(scenario, trainer)


@cache
def _right(name: str) -> Trained:
    return oracle.whole_batch(next(one for one in scenarios() if one.name == name))


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


# ---------------------------------------------------------------------------------------------------- known by name
@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    title: str
    file: str
    package: str | None = None
    by_default: bool = True


KNOWN = {
    "textbook": _Known(title="textbook", file="loops"),
    "accelerate": _Known(title="Accelerate", file="loops", package="accelerate"),
    "fabric": _Known(title="Fabric", file="loops", package="lightning"),
    "lightning": _Known(title="Lightning", file="trainers", package="lightning"),
    "transformers": _Known(title="Transformers", file="trainers", package="transformers"),
    "ignite": _Known(title="Ignite", file="trainers", package="ignite"),
    "accumulator": _Known(title="Accumulator", file="library"),
    "train_step": _Known(title="TrainStep", file="library"),
    "exact_accelerate": _Known(title="Accelerate, exact", file="library", package="accelerate", by_default=False),
    "exact_lightning": _Known(title="Lightning, exact", file="library", package="lightning", by_default=False),
    "exact_transformers": _Known(title="Transformers, exact", file="library", package="transformers", by_default=False),
}
"""Adapters by the name that the command takes; those not ``by_default`` run when they are named."""


def known(name: str) -> Trainer:
    """The adapter of that name in `KNOWN`."""
    one = KNOWN[name]
    module = f"gradaccum.conformance.adapters.{one.file}"
    return Trainer(
        title=one.title,
        function=getattr(importlib.import_module(module), name),
        imports=(f"from {module} import {name} as train",),
    )


def installed() -> list[Trainer]:
    """Those of `KNOWN` that run by default and whose package is there."""
    return [known(name) for name, one in KNOWN.items() if one.by_default and is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether the package of a known adapter is there."""
    package = KNOWN[name].package
    return package is None or importlib.util.find_spec(package) is not None


def package_versions() -> dict[str, str]:
    """Python's, torch's and those of the packages of known adapters."""
    return versions(*dict.fromkeys(one.package for one in KNOWN.values() if one.package))


def figure(verdict: Verdict) -> str:
    """The verdict as an entry of a table."""
    if verdict.outcome == "not offered":
        return "-"
    if verdict.error is None:
        return "error"
    if not math.isfinite(verdict.error):
        return "lost" if math.isinf(verdict.error) else "nan"
    return f"{verdict.error:.0e}".replace("e-0", "e-").replace("e+0", "e")
