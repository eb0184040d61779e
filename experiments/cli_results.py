"""The commands of ``leakbed`` that read results folders: the report, exports, two side by side.

What a command needs is imported in it, so help and typing mistakes are answered at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from leakbed.errors import INTERRUPTED, verdict


class OverrideError(ValueError):
    """An option that cannot be meant as it was given."""


@contextmanager
def expected() -> Iterator[None]:
    """End an expected error with its lines and exit code; others keep their traceback."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if (found := verdict(error)) is None:
            raise
        code, lines = found
        for line in lines:
            typer.echo(line, err=True)
        if code == INTERRUPTED:
            typer.echo(err=True)
        raise typer.Exit(code) from None


def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
) -> None:
    """Write report.html into a results folder (the --out of a run)."""
    with expected():
        from experiments.report.page import write_report

        typer.echo(f"Report: {write_report(folder).resolve()}")


def results(
    folder: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
    *,
    by_seed: Annotated[bool, typer.Option("--by-seed", help="A line for each seed.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="LaTeX tables instead.")] = False,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="Of the LaTeX tables; may be repeated.")
    ] = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="BibTeX of what was used.")] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Write SVG and PDF figures there.", show_default=False)
    ] = None,
) -> None:
    """Print a folder's last run for a paper: as CSV, LaTeX or BibTeX, or write its figures."""
    with expected():
        if latex + bibtex + by_seed + (figures is not None) > 1:
            raise OverrideError("give one of --by-seed, --latex, --bibtex and --figures at a time")
        if metrics and not latex:
            raise OverrideError("--metric chooses what --latex shows; give both, or neither")
        from experiments.report import bibliography, export
        from experiments.report.rows import read_last_run

        if figures is not None:
            for file in export.write_figures(read_last_run(folder).cards, figures):
                typer.echo(file)
        elif latex:
            typer.echo(export.latex(read_last_run(folder).cards, metrics=metrics or ()))
        elif bibtex:
            typer.echo(bibliography.bibliography(read_last_run(folder).cards), nl=False)
        else:
            table = export.records(folder, by_seed=by_seed)
            typer.echo(export.comma_separated(table), nl=False)


def diff(
    first: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
) -> None:
    """Say which settings and scores of two results folders differ, and which scores for sure."""
    with expected():
        from experiments.report.differences import differences

        typer.echo("\n".join(differences(first, second).lines()))
