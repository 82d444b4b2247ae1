"""What can be typed after ``gradaccum``: options and help. Each command does its work in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import gradaccum as ga
from gradaccum.report.extras import extra_needed

app = typer.Typer(
    name="gradaccum",
    help="Gradient accumulation that is exact: the whole batch's update, in micro-batches that fit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the loss curves and the distances: .png, .svg or .pdf."),
    ] = None,
) -> None:
    """Whole batch, textbook loop and gradaccum side by side.

    Trains the same model three times from the same start: on whole batches, with the loop that everybody writes, and
    with this library. First a linear regression, then the same with a batch that comes out uneven, then a language
    model on Shakespeare. Takes about 15 seconds on two cores.

    Exit status: 0 if the library is exact, 1 if it is not, 2 if the demo could not run.
    """
    from gradaccum.cli.demo.command import run_demo

    _check_picture(plot)
    raise typer.Exit(0 if run_demo(plot=plot) else 1)


def _check_picture(plot: Path | None) -> None:
    """That a picture can be drawn: before the work, not after it."""
    from gradaccum.report.plots import supported_suffixes

    if plot is not None:
        with extra_needed("plot", "The option --plot"):
            suffixes = supported_suffixes()
        if plot.suffix.lower() not in suffixes:
            raise typer.BadParameter(f"{plot}: a picture ends in {', '.join(suffixes)}.", param_hint="--plot")
        if not plot.absolute().parent.is_dir():
            raise typer.BadParameter(f"{plot}: there is no folder {plot.parent}.", param_hint="--plot")


@app.command()
def audit(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="path/to/file.py:function or package.module:function.")
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report as a page.")] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples that one forward sees. Default: the job's own, or 8."),
    ] = None,
) -> None:
    """Is it exact: the accumulated gradient against the whole batch's, and what keeps them apart.

    The function returns ga.Job(model, loss_fn, batch). The model is left as it was.

    Exit status: 0 if accumulation is exact, 1 if it is not, 2 if the audit could not run.
    """
    from gradaccum.cli.audit import run_audit

    _check_page(html)
    raise typer.Exit(0 if run_audit(target, micro_batch_size=micro_batch_size, html=html) else 1)


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="path/to/file.py:function or package.module:function.")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The budget: 24GiB, 24GB, 512MiB. Default: what the device has.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Count without running anything on a device.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="With --estimate: the device to estimate for, such as cuda.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the plan as a page.")] = None,
) -> None:
    """What fits: memory and throughput at each micro-batch size, and which one to take.

    The function returns ga.Job(model, loss_fn, batch, optimizer=...). Model and optimizer are left as they were.

    Exit status: 0 if a micro-batch fits, 1 if none does, 2 if the plan could not be made.
    """
    from gradaccum.cli.plan import run_plan

    _check_page(html)
    fits = run_plan(target, memory=memory, estimate=estimate, device=device, html=html)
    raise typer.Exit(0 if fits else 1)


def _check_page(html: Path | None) -> None:
    """That a page can be written: before the work, not after it."""
    from gradaccum.report.html import template

    if html is not None:
        template("The option --html")
        if not html.absolute().parent.is_dir():
            raise typer.BadParameter(f"{html}: there is no folder {html.parent}.", param_hint="--html")


@app.command()
def bench(
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures, with the machine's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the ratios: .png, .svg or .pdf.")] = None,
) -> None:
    """This machine: the library against a hand-written loop. Takes about 10 seconds.

    Exit status: 0, or 2 if it could not run.
    """
    from gradaccum.cli.bench import run_bench

    if json is not None and not json.absolute().parent.is_dir():  # before the work, not after it
        raise typer.BadParameter(f"{json}: there is no folder {json.parent}.", param_hint="--json")
    _check_picture(plot)
    run_bench(json_path=json, plot=plot)
