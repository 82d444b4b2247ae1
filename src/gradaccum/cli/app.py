"""What can be typed after ``gradaccum``: options and help. What cannot be written is refused before the work."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer

import gradaccum as ga
from gradaccum.report import extra_needed
from gradaccum.report.plots import SUFFIXES

app = typer.Typer(
    name="gradaccum",
    help="Gradient accumulation that is exact: the whole batch's update, in micro-batches that fit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Target = Annotated[str, typer.Argument(metavar="TARGET", help="path/to/file.py:function or package.module:function.")]
_WRITERS = {"plot": "matplotlib", "cli": "jinja2"}  # what writes a file, by the extra that it comes with
_Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result as a page.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradaccum {ga.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions of gradaccum and torch.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw losses and distances: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Whole batch, textbook loop and gradaccum side by side.

    Trains the same linear regression three times from the same start: on whole batches, with the loop that everybody
    writes, and with this library. First 1,000 samples, then 957 with a batch that comes out uneven, then sequences of
    unequal length. Takes a few seconds.

    Exit status: 0 if the library is exact, 1 if it is not, 2 if the demo could not run.
    """
    from gradaccum.cli.demo import run_demo

    _check_file(plot, "--plot", extra="plot", suffixes=SUFFIXES)
    raise typer.Exit(0 if run_demo(plot=plot) else 1)


@app.command()
def audit(
    target: _Target,
    html: _Html = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples that one forward sees. Default: the job's own, or 8."),
    ] = None,
) -> None:
    """Is accumulation the whole batch, and if not, why not?

    The target is a function without arguments that returns what is trained; the model is left as it was. A file is run
    from top to bottom first: what trains belongs under if __name__ == "__main__".

    \b
        def job():
            model = ...
            return ga.Job(model, lambda model, batch: ..., batch)

    Exit status: 0 if accumulation is exact, 1 if it is not, 2 if the audit could not run.
    """  # noqa: D301  # click's mark of lines that stay as they are
    from gradaccum.cli.audit import run_audit

    _check_file(html, "--html", extra="cli")
    raise typer.Exit(0 if run_audit(target, micro_batch_size=micro_batch_size, html=html) else 1)


@app.command()
def plan(
    target: _Target,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The budget: 24GiB, 24GB, 512MiB. Default: what the device has.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Count without running anything on a device.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="With --estimate: the device to estimate for, such as cuda.")
    ] = None,
    html: _Html = None,
) -> None:
    """What fits: memory and time at each micro-batch size.

    And which one to take. The target is a function without arguments that returns what is trained; model and optimizer
    are left as they were. A file is run from top to bottom first: what trains belongs under if __name__ == "__main__".

    \b
        def job():
            model, optimizer = ...
            return ga.Job(model, lambda model, batch: ..., batch, optimizer=optimizer)

    Exit status: 0 if a micro-batch fits, 1 if none does, 2 if the plan could not be made.
    """  # noqa: D301  # click's mark of lines that stay as they are
    from gradaccum.cli.plan import run_plan

    _check_file(html, "--html", extra="cli")
    raise typer.Exit(0 if run_plan(target, memory=memory, estimate=estimate, device=device, html=html) else 1)


@app.command()
def bench(
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures, with the machine's.")
    ] = None,
) -> None:
    """This machine: the library against a hand-written loop. Takes about 10 seconds.

    Exit status: 0, or 2 if it could not run.
    """
    from gradaccum.cli.bench import run_bench

    _check_file(json, "--json")
    run_bench(json_path=json)


@app.command()
def conformance(
    adapter: Annotated[
        str | None,
        typer.Argument(metavar="[ADAPTER]", help="path/to/file.py:function, package.module:function, or a known name."),
    ] = None,
    html: _Html = None,
) -> None:
    """Any trainer, held against the whole batch in float64.

    In the cases where accumulation goes wrong.

    An adapter is train(model, optimizer, loss, batches, *, micro_batches, epochs), which returns parameters and
    reported losses. Without one, all that are installed run, in a minute or two: textbook, accelerate, fabric,
    lightning, transformers, accumulator and train_step. Known as well: exact_accelerate, exact_lightning and
    exact_transformers. docs/conformance.md says how to write one.

    Exit status: 0 if the adapter is exact wherever it trains, 1 if it is not (always 0 without ADAPTER), 2 if it could
    not run.
    """
    from gradaccum.cli.conformance import run_conformance

    _check_file(html, "--html", extra="cli")
    raise typer.Exit(0 if run_conformance(adapter, html=html) else 1)


def _check_file(path: Path | None, option: str, *, extra: str = "", suffixes: tuple[str, ...] = ()) -> None:
    """Refuses, before the work, a file that could not be written after it, by what the ``extra`` installs."""
    if path is None:
        return
    if extra:
        with extra_needed(extra, f"The option {option}"):
            importlib.import_module(_WRITERS[extra])
    if suffixes and path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path}: a picture ends in {', '.join(suffixes)}.", param_hint=option)
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}.", param_hint=option)
