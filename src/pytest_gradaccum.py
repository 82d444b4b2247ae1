"""``pytest --conformance my_module:adapter``: another project's trainer against the whole batch, in its own suite.

pytest imports this module wherever gradaccum is installed, so it imports neither gradaccum nor torch until the option
is given, and lies beside the package, whose own import brings torch in.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option, and the scenarios that a project knows its trainer to fail."""
    group = parser.getgroup("gradaccum", "gradient accumulation against the whole batch")
    group.addoption(
        "--conformance",
        metavar="ADAPTER",
        help="Also run a trainer through the scenarios of `gradaccum conformance`: package.module:function, "
        "path/to/file.py:function or a known name.",
    )
    parser.addini(
        "conformance_known",
        "Scenarios that the adapter is known to fail; one that passes is an error.",
        type="linelist",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds a test for each scenario."""
    adapter = config.getoption("--conformance")
    if adapter is None:
        return
    from gradaccum.cli.conformance import trainer_of
    from gradaccum.conformance import scenarios
    from gradaccum.errors import GradAccumError

    known = set(config.getini("conformance_known"))
    try:
        trainer, cases = trainer_of(adapter), scenarios()
    except GradAccumError as error:
        raise pytest.UsageError(f"--conformance {adapter}: {error}") from error
    unknown = sorted(known - {case.name for case in cases})
    if unknown:
        raise pytest.UsageError(
            f"conformance_known names {', '.join(map(repr, unknown))}, and no scenario is called so. There are: "
            f"{', '.join(repr(case.name) for case in cases)}"
        )
    for case in cases:
        item = ConformanceItem.from_parent(session, name=f"conformance[{case.name}]", case=case, trainer=trainer)
        if case.name in known:
            item.add_marker(pytest.mark.xfail(reason="in conformance_known", strict=True, raises=NotConforming))
        items.append(item)


class NotConforming(AssertionError):
    """A trainer whose result is not the whole batch's; the message says by how much, why, and how to see it."""


class ConformanceItem(pytest.Item):
    """One scenario."""

    def __init__(self, *, case: Any, trainer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._case, self._trainer = case, trainer

    def runtest(self) -> None:
        """Trains and compares; a scenario that the trainer does not offer is skipped."""
        from gradaccum.conformance import judge

        verdict = judge(self._case, self._trainer)
        if verdict.outcome == "not offered":
            pytest.skip(str(verdict.reason))
        if verdict.outcome != "exact":
            raise NotConforming("\n".join([str(verdict), "", *verdict.reproduction]))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The message alone where the trainer is off, a traceback where something else went wrong."""
        return str(excinfo.value) if isinstance(excinfo.value, NotConforming) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where it is from, for the summary."""
        return self.path, None, self.name
