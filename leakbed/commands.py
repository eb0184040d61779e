"""The commands: a thin shell over :mod:`leakbed.api`.

Nothing heavy is imported before settings are checked, so help and typing mistakes are answered at
once.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leakbed import __version__, api
from leakbed.faults import INTERRUPTED, verdict

if TYPE_CHECKING:
    from rich.console import Console

    from leakbed.cards import Card

app = typer.Typer(
    help="Measure what federated and split learning on Flower leak.",
    epilog="Start with `leakbed compare`. Exit codes: 0 done, 1 a run failed, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Out = Annotated[Path | None, typer.Option(help="Results folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY=VALUE", help="Replace a setting; may be repeated."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Run on this Ray cluster; `auto` finds this machine's.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show Flower's own log.")]


class OverrideError(ValueError):
    """An ``-o`` that is not key=value."""


@app.callback(invoke_without_command=True)
def leakbed(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Measure what federated and split learning on Flower leak."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def compare(
    *,
    out: Out = None,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
    verbose: Verbose = False,
) -> None:
    """Compare what FedAvg weights and split activations leak, on the same private images."""
    with expected():
        chosen = [*(overrides or ()), *_on_ray(ray_address)]
        _experiment(api.FLAGSHIP, out=out, overrides=chosen, verbose=verbose)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The experiment's TOML file.", show_default=False)],
    *,
    out: Out = None,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
    verbose: Verbose = False,
) -> None:
    """Run the experiment of a TOML file; finished cells are not run again."""
    with expected():
        chosen = [*(overrides or ()), *_on_ray(ray_address)]
        _experiment(file, out=out, overrides=chosen, verbose=verbose)


@app.command()
def attack(
    trace: Annotated[Path, typer.Argument(help="A recorded trace.", show_default=False)],
    *,
    name: Annotated[str, typer.Option("--with", help="The attack.", show_default=False)],
    answers: Annotated[
        Path | None,
        typer.Option(help="The answer key; without it nothing is scored.", show_default=False),
    ] = None,
    out: Out = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Attack the folder of a recorded trace, with or without its answers."""
    with expected():
        settings = dict(map(_pair, overrides or ()))
        if "name" in settings:
            raise OverrideError("-o name=... has no meaning here; --with names the attack")
        # A typing mistake should be answered before torch is imported.
        api.check({"name": "attack", "attack": [{"name": name, **settings}]})
        named = trace if trace.name.strip(".") else trace.resolve()  # "." names no results
        folder = out or named.parent / f"{named.name}-attacked"
        _quiet_flower(verbose=verbose)
        card = api.attack_trace(trace, name, answers=answers, out=folder, settings=settings)
        _show([card], folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
) -> None:
    """Write report.html into a results folder (the --out of a run)."""
    with expected():
        typer.echo(f"Report: {api.report(folder).resolve()}")


@app.command("list")
def list_() -> None:
    """List data sets, models, protocols, attacks and defences."""
    with expected():
        from leakbed.console import listing  # noqa: PLC0415  rich's tables, for commands only

        for table in listing(api.catalogue()):
            _console().print(table)
            typer.echo()


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


def _experiment(source: Path, *, out: Path | None, overrides: Sequence[str], verbose: bool) -> None:
    """Run an experiment under a progress bar and show what came of it."""
    checked = api.check(source, overrides)
    folder = out or api.results_folder(checked)
    from leakbed.console import Bars  # noqa: PLC0415  pydantic's and rich's share of the second

    _quiet_flower(verbose=verbose)
    with Bars(_console(stderr=True)) as bars:
        cards = api.run(checked, out=folder, progress=bars)
    _show(cards, folder)


def _on_ray(address: str | None) -> list[str]:
    """Return the overrides that put an experiment on a Ray cluster."""
    return [] if address is None else ['grid="ray"', f'ray_address="{address}"']


def _show(cards: Sequence[Card], folder: Path) -> None:
    """Print the summary, and write the report and say where it is."""
    from leakbed.console import summary  # noqa: PLC0415  as above

    console = _console()
    for part in summary(cards):
        console.print(part)
    typer.echo(f"Report: {api.report(folder).resolve()}")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console  # noqa: PLC0415  a quarter of the time help takes

    return Console(stderr=stderr, highlight=False)


def _quiet_flower(*, verbose: bool) -> None:
    """Keep Flower's log to warnings, unless it was asked for."""
    import flwr.common.logger  # noqa: F401, PLC0415  importing it sets the level

    if not verbose:
        logging.getLogger("flwr").setLevel(logging.WARNING)


def _pair(override: str) -> tuple[str, Any]:
    """Return the key and value of an ``-o``, read as TOML, else as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OverrideError(f"-o {override!r} must be key=value, such as -o targets=8")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text
