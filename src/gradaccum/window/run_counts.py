"""The counts of a run, which are saved with it: updates, micro-batches and samples, never "steps"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradaccum.errors import StateError

_NAMES = ("updates", "micro_batches", "samples")
VERSION = 1
"""Of the states of this package's objects; one that does not say is as this."""


def check_state(state: Any, *names: str, of: str) -> None:
    """Checks that a state is of a version that is known here, and holds what it should.

    Raises:
        StateError: it does not.
    """
    held: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
    version = held.get("version", VERSION)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise StateError(
            f"The state of {of} is of version {version!r}, and this version of gradaccum reads up to {VERSION}. What "
            "it holds may mean something else, so nothing was loaded. Go on with the version that saved it."
        )
    missing = [name for name in names if name not in held]
    if missing:
        raise StateError(
            f"The state of {of} has no {', '.join(missing)}; it is a {type(state).__name__} that holds "
            f"{', '.join(map(str, held)) or 'nothing'}. It was saved from another object, or by another version. Load "
            "what its own state_dict() returned, or begin without."
        )


class HasCounts:
    """The public counters of both ways of training."""

    _counts: RunCounts

    @property
    def updates(self) -> int:
        """Updates so far, skipped ones too."""
        return self._counts.updates

    @property
    def micro_batches(self) -> int:
        """Micro-batches that went into updates so far."""
        return self._counts.micro_batches

    @property
    def samples(self) -> int:
        """Samples that went into updates so far."""
        return self._counts.samples


@dataclass(slots=True)
class RunCounts:
    """Counts of everything that went into updates so far; rows as far as they could be seen."""

    updates: int = 0
    micro_batches: int = 0
    samples: int = 0

    def add(self, micro_batches: int, samples: int) -> None:
        """Counts one update."""
        # In one assignment, so that Ctrl-C finds either all counted or nothing.
        self.updates, self.micro_batches, self.samples = (
            self.updates + 1, self.micro_batches + micro_batches, self.samples + samples
        )  # fmt: skip

    def state_dict(self, *, open_micro_batches: int, open_samples: int) -> dict[str, Any]:
        """The counts.

        Raises:
            StateError: a window is open, whose gradients would be lost.
        """
        if open_micro_batches:
            raise StateError(
                f"A window is open, with {open_micro_batches} micro-batches ({open_samples} samples) added "
                "up and not applied; a state saved now would lose their gradients. Save right after an update, or "
                "throw them away before: accumulator.discard()."
            )
        return {**{name: getattr(self, name) for name in _NAMES}, "version": VERSION}

    @staticmethod
    def check(state: Mapping[str, Any], *, open_micro_batches: int) -> None:
        """Checks that a state can be loaded.

        Raises:
            StateError: it is not one, or of another version, or a window is open.
        """
        if open_micro_batches:
            raise StateError(
                f"A window is open, with {open_micro_batches} micro-batches added up; loading would mix them into "
                "the first update of another run. Load before training starts."
            )
        check_state(state, of="the counts")
        held = state if isinstance(state, Mapping) else {}
        missing = [name for name in _NAMES if type(held.get(name)) is not int or held[name] < 0]
        if missing:
            raise StateError(
                f"The state has no count of {', '.join(missing)}; it is a {type(state).__name__} that holds "
                f"{', '.join(map(str, held)) or 'none of them'}. Load what state_dict() of an Accumulator or a "
                "TrainStep returned."
            )

    def load_state_dict(self, state: Mapping[str, Any], *, open_micro_batches: int) -> None:
        """Goes on counting from a state; see `check`."""
        self.check(state, open_micro_batches=open_micro_batches)
        self.updates, self.micro_batches, self.samples = (state[name] for name in _NAMES)
