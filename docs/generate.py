"""Writes the pages that are made of the code: ``python docs/generate.py``. A test compares them with what is there.

- `errors.md`: every error and warning with what it means and what to do, from the docstrings of `errors.py`.
- `reference/`: every public name, for mkdocstrings to fill in from its docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import gradaccum as ga
from gradaccum import errors

FOLDER = Path(__file__).parent

REFERENCE: dict[str, tuple[str, tuple[str, ...]]] = {
    "training": ("Training", ("Accumulator", "TrainStep", "Update", "Window", "GhostBatch", "gather")),
    "losses": ("Losses", ("Loss", "criterion", "weight_of", "chunked", "chunked_head", "balance_over_batch")),
    "batches": ("Batches", ("Split", "split_by_samples", "split_by_cost", "split_packed", "split_as_given")),
    "tools": ("Audit and plan", ("audit", "Report", "Culprit", "plan", "Plan", "advise", "Job")),
    "runs": ("Processes and checkpoints", ("GlobalBatchSampler", "Checkpoint")),
    "errors": ("Errors and warnings", tuple(name for name in errors.__dict__ if name in ga.__all__)),
}
"""The pages of the reference: title and public names of each."""

INTEGRATIONS = (
    "gradaccum.integrations.exact",
    "gradaccum.integrations.transformers.exact",
    "gradaccum.integrations.transformers.ExactTrainer",
    "gradaccum.integrations.transformers.ExactMixin",
    "gradaccum.integrations.lightning.ExactAccumulation",
    "gradaccum.integrations.accelerate.exact",
    "gradaccum.integrations.accelerate.accumulator",
    "gradaccum.testing.assert_exact",
)
"""What is public outside of ``ga``: integrations, and the assertion for tests."""


def pages() -> dict[str, str]:
    """Text by path, relative to `docs`."""
    made = {"errors.md": errors_page()}
    for stem, (title, names) in REFERENCE.items():
        made[f"reference/{stem}.md"] = reference_page(title, (f"gradaccum.{name}" for name in names))
    made["reference/integrations.md"] = reference_page("Integrations and tests", INTEGRATIONS)
    return made


def reference_page(title: str, names: Iterator[str] | tuple[str, ...]) -> str:
    """A heading, and a place for each name that mkdocstrings fills in."""
    places = (f"::: {name}" for name in names)
    return "\n\n".join([f"# {title}", "From the docstrings; `make docs` fills this page in.", *places]) + "\n"


def errors_page() -> str:
    """Every error and warning: its bases, its first sentence, and the remedy."""
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    parts = [
        "# Errors and what to do",
        "Generated from `src/gradaccum/errors.py` by `python docs/generate.py`. A message itself says what happened, "
        "with the numbers, what it would do to the gradient, and what to type instead.",
    ]
    for heading, base in (("Errors", errors.GradAccumError), ("Warnings", errors.GradAccumWarning)):
        parts.append(f"## {heading}")
        parts.append(f"All derive from `ga.{base.__name__}`.")
        for one in classes:
            if issubclass(one, base) and one is not base:
                parts += list(error_parts(one))
    return "\n\n".join(parts) + "\n"


def error_parts(one: type) -> Iterator[str]:
    """The section of one class."""
    what, _, remedy = inspect.cleandoc(one.__doc__ or "").partition("\n\nRemedy: ")
    bases = ", ".join(f"`{base.__name__}`" for base in one.__bases__)
    yield f"### {one.__name__}"
    yield f"{markdown(what)} Also: {bases}."
    yield f"**What to do:** {markdown(remedy)}"


def markdown(text: str) -> str:
    """A docstring's double backticks as Markdown's, on one line."""
    return re.sub(r"`+", "`", " ".join(text.split()))


if __name__ == "__main__":
    for path, text in pages().items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        (FOLDER / path).write_text(text, encoding="utf-8")
