"""The commands of ``leakbed``.

What a command needs is imported in it, so help and typing mistakes are answered at once.
"""

from __future__ import annotations

import json
import logging
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli_results import OverrideError, diff, expected, report, results
from leakbed import __version__
from leakbed.errors import BAD_INPUT, came_to_nothing

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.results.cards import Card
    from leakbed.contracts import Defense

app = typer.Typer(
    help="Measure what federated and split learning on Flower leak.",
    epilog="Start with `leakbed compare`. Exit codes: 0 done, 1 a run or a cell failed or "
    "every training diverged, 2 bad input or no cell whose parts fit.",
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
Model = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:CLASS",
        help="The network, in place of the trace's; one of one's own is imported only if named.",
        show_default=False,
    ),
]
Cut = Annotated[
    str | None,
    typer.Option(
        metavar="INDEX|PATH",
        help="The bottom's last layer, by index or path (features.3), in place of the trace's.",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Share training runs among this Ray cluster's machines; `auto` finds this machine's.",
        show_default=False,
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(help="Settings of another scale, such as `paper`.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show Flower's own log.")]


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
        from experiments.settings.load import FLAGSHIP
    run(FLAGSHIP, out=out, overrides=overrides, ray_address=ray_address, verbose=verbose)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The experiment's TOML file.", show_default=False)],
    *,
    scale: Scale = None,
    out: Out = None,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
    verbose: Verbose = False,
) -> None:
    """Run the experiment of a TOML file; finished cells are not run again."""
    with expected():
        from experiments.console import Bars
        from experiments.results.folder import default_folder
        from experiments.settings.load import at_scale, load_settings

        # The machines of a Ray cluster are one more setting.
        chosen = [
            *(overrides or ()),
            *([f'ray_address="{ray_address}"'] if ray_address is not None else []),
        ]
        checked = load_settings(file if scale is None else at_scale(file, scale), chosen)
        folder = out or default_folder(checked.name)
        _quiet_flower(verbose=verbose)
        from experiments.run.runner import run as run_cells

        with Bars(_console(stderr=True)) as bars:
            cards = run_cells(checked, out=folder, progress=bars)
        _show(cards, folder)
        if code := came_to_nothing([card.status for card in cards]):
            raise typer.Exit(code)


@app.command()
def schema() -> None:
    """Print the JSON schema of a settings file, for editors."""
    with expected():
        from experiments.reference import schema as made

        typer.echo(json.dumps(made(), indent=1))


@app.command()
def rescore(
    results: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
    *,
    verbose: Verbose = False,
) -> None:
    """Score the kept guesses of a folder's last run again, without training or attacking."""
    with expected():
        _quiet_flower(verbose=verbose)
        from experiments.console import Bars
        from experiments.run.rescore import rescore as again

        with Bars(_console(stderr=True)) as bars:
            found = again(results, progress=bars)
        for label, why in found.lacking.items():
            typer.echo(f"not scored again: {label}: {why}; `leakbed run` does it anew", err=True)
        typer.echo(f"{found.changed} of {len(found.cards)} results scored again")
        _show(found.cards, results)


@app.command()
def attack(
    trace: Annotated[Path, typer.Argument(help="A recorded trace.", show_default=False)],
    *,
    name: Annotated[str, typer.Option("--with", help="The attack.", show_default=False)],
    answers: Annotated[
        Path | None,
        typer.Option(help="The answer key; without it nothing is scored.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the attack; by default the run's, if known.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it computes: auto, cpu, cuda, cuda:0, ...")
    ] = "auto",
    model: Model = None,
    cut: Cut = None,
    about: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A fact of the run, in place of what the trace says, such as batch_size=8.",
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="Returns a partition's images and labels as its node fed them, to score by.",
            show_default=False,
        ),
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
        from experiments.settings.load import load_settings

        # A typing mistake should be answered before torch is imported.
        load_settings({"name": "attack", "attack": [{"name": name, **settings}]})
        named = trace if trace.name.strip(".") else trace.resolve()  # "." names no results
        folder = out or named.parent / f"{named.name}-attacked"
        _quiet_flower(verbose=verbose)
        from experiments.run.offline import attack_trace

        card = attack_trace(
            trace,
            name,
            answers=answers,
            out=folder,
            settings=settings,
            seed=seed,
            device=device,
            model=model,
            about=_facts(about, cut),
            truth=truth,
        )
        _show([card], folder)


@app.command()
def trace(
    folder: Annotated[Path, typer.Argument(help="A recorded trace.", show_default=False)],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recorded trace holds: app, rounds, nodes, messages, and what it lacks."""
    with expected():
        from leakbed.tap.trace import Trace
        from leakbed.tap.trace_summary import summary

        found = summary(Trace(folder, partial=True))
        typer.echo(json.dumps(asdict(found), indent=1) if as_json else "\n".join(found.lines()))


@app.command()
def ceiling(
    run: Annotated[
        Path, typer.Argument(help="A run's folder: trace and answers.", show_default=False)
    ],
    *,
    collect: Annotated[str, typer.Option(help="Round: first, middle, last or a number.")] = "last",
    when: Annotated[str, typer.Option(help="Smashed rows: training or inference.")] = "training",
    targets: Annotated[int, typer.Option(min=1, help="How many messages at most.")] = 8,
    candidates: Annotated[
        int, typer.Option(min=2, help="Among how many rows it is sought.")
    ] = 1000,
    draws: Annotated[int, typer.Option(min=1, help="Of the noise, for each candidate.")] = 4,
    span: Annotated[
        str, typer.Option(help="What is read of a row: message, round or training.")
    ] = "message",
    summed: Annotated[
        bool, typer.Option("--summed", help="The sum of a round's updates alone.")
    ] = False,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, by message.")] = False,
) -> None:
    """Say what a recorded run's messages give away to the best possible guess."""
    with expected():
        if when not in {"training", "inference"}:
            raise OverrideError(f"--when {when!r} must be training or inference")
        from experiments.run.ceilings import ceiling_of_run

        found = ceiling_of_run(
            run,
            collect=_round(collect),
            when=when,
            targets=targets,
            candidates=candidates,
            draws=draws,
            span=span,
            summed=summed,
            model=model,
        )
        typer.echo(json.dumps(found.table(), indent=1) if as_json else "\n".join(found.lines()))


@app.command("label-ceiling")
def label_ceiling(
    run: Annotated[
        Path, typer.Argument(help="A run's folder: trace and answers.", show_default=False)
    ],
    *,
    collect: Annotated[
        str, typer.Option(help="Last round read: first, middle, last or a number.")
    ] = "last",
    span: Annotated[
        str,
        typer.Option(help="The own batch's message alone (message), or all behind it (training)."),
    ] = "training",
    targets: Annotated[int, typer.Option(min=1, help="How many canaries at most.")] = 8,
    draws: Annotated[int, typer.Option(min=1, help="Of the noise, for each label.")] = 100,
    kappa: Annotated[
        float | None,
        typer.Option(
            help="Also bound an adversary with the inputs: its accuracy without any message.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, by canary.")] = False,
) -> None:
    """Say what gradients or updates give away of a canary's label to the best possible guess."""
    with expected():
        from experiments.run.label_ceilings import label_ceiling_of_run

        found = label_ceiling_of_run(
            run,
            collect=_round(collect),
            span=span,
            targets=targets,
            draws=draws,
            kappa=kappa,
            model=model,
        )
        typer.echo(json.dumps(found.table(), indent=1) if as_json else "\n".join(found.lines()))


@app.command()
def audit(
    target: Annotated[
        Path,
        typer.Argument(metavar="APP", help="A Flower app's folder or .fab.", show_default=False),
    ],
    *,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes to run it on.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 600,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:NAME",
            help="Its network, which is looked for otherwise.",
            show_default=False,
        ),
    ] = None,
    cut: Cut = None,
    about: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A fact of the run, in place of what is seen."),
    ] = None,
    attacks: Annotated[
        list[str] | None, typer.Option("--with", help="Only this attack; may be repeated.")
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of every node; {partition} in it stands for the node's partition id.",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of each search for images.")] = 300,
    out: Out = None,
    verbose: Verbose = False,
) -> None:
    """Run a copy of a Flower app as it stands, and say what its messages leak."""
    with expected():
        folder = out or Path("runs") / f"audit-{target.resolve().stem}"
        _quiet_flower(verbose=verbose)
        from experiments.app_audit.app import audit_app
        from experiments.results.folder import lock_folder, make_folder

        with lock_folder(make_folder(folder)):
            found = audit_app(
                target,
                folder.resolve(),
                nodes=nodes,
                limit=limit,
                model=model,
                about=_facts(about, cut),
                attacks=tuple(attacks or ()),
                iterations=iterations,
                node_config=dict(map(_pair, node_config)) if node_config else None,
            )
        for heading, lines in (("Assumed", found.assumed), ("Seen", found.leaks)):
            for line in lines:
                typer.echo(f"{heading}: {line}")
        if "all" in found.unfit:
            typer.echo(f"Not attacked: {found.unfit['all']}")
        else:
            typer.echo(f"Attacks that do not fit: {', '.join(found.unfit) or 'none'} (audit.json)")
        if found.cards:
            _show(found.cards, folder)


@app.command()
def gate(
    results: Annotated[Path, typer.Argument(help="A results folder.", show_default=False)],
    *,
    most: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="MEASURE=LIMIT", help="The most allowed, such as ssim=0.3."),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="MEASURE=LIMIT", help="The least allowed, such as mse=0.01."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Earlier results not to exceed.", show_default=False)
    ] = None,
    decides: Annotated[str, typer.Option(help="Who decides; noted in gate.json.")] = "not named",
    out: Annotated[
        Path | None, typer.Option(help="Where gate.json, .xml and .sarif go.", show_default=False)
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Copy the reconstructed pictures there too.")
    ] = False,
) -> None:
    """Hold results against limits: exit code 0 pass, 1 fail, 3 not evaluable."""
    with expected():
        from experiments.app_audit import gate as gating

        judged = gating.gate(
            results,
            most=_limits(most),
            least=_limits(least),
            baseline=baseline,
            decides=decides,
        )
        folder = out or results / "gate"
        judged.write(folder)
        if pictures and (results / "pictures").is_dir():
            shutil.copytree(results / "pictures", folder / "pictures", dirs_exist_ok=True)
        for finding in judged.findings:
            typer.echo(finding.line())
        typer.echo(f"{judged.verdict} ({folder})")
        if judged.verdict != "pass":
            raise typer.Exit(1 if judged.verdict == "fail" else 3)


@app.command("audit-defense")
def audit_defense(
    name: Annotated[str, typer.Argument(help="The defence.", show_default=False)],
    *,
    draws: Annotated[
        int | None,
        typer.Option(
            min=100,
            help="Of each input; by default 100,000 rows or labels, or 4,000 updates.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Hold a defence's claim of differential privacy against draws from it."""
    with expected():
        from leakbed.oracle.audit import audit as audited

        defense = _defense(name, dict(map(_pair, overrides or ())))
        found = audited(defense, draws=draws)
        for each in found:
            typer.echo(str(each))
        if not all(each.holds for each in found):
            raise typer.Exit(1)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="PACKAGE.MODULE:CLASS.", show_default=False)],
) -> None:
    """Say whether an attack, a defence or a metric of one's own keeps its contract."""
    from experiments.catalogue import check_plugin

    with expected():
        found = check_plugin(name)
        for each in found:
            typer.echo(f"{name}: {each}", err=True)
        if found:
            raise typer.Exit(BAD_INPUT)
        typer.echo(f"{name} keeps its contract")


for reads_results in (report, results, diff):
    app.command()(reads_results)


@app.command("list")
def list_() -> None:
    """List data sets, models, protocols, attacks and defences."""
    with expected():
        from experiments.catalogue import catalogue
        from experiments.console import listing

        for table in listing(catalogue()):
            _console().print(table)
            typer.echo()


def _defense(name: str, settings: Mapping[str, Any]) -> Defense:
    """Return a defense by its catalogue key or ``package.module:Class``."""
    from defenses import DEFENSES
    from leakbed.contracts.hooks import refuse_uncalled
    from leakbed.lookup import unknown_name
    from leakbed.oracle.audit import NoAuditError
    from leakbed.plugins import is_own, picked

    if not is_own(name) and name not in DEFENSES:
        raise NoAuditError(unknown_name("defence", name, DEFENSES))
    kind = picked(name, DEFENSES, "defence")
    refuse_uncalled(kind)
    legal = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        if key not in legal:
            raise NoAuditError(unknown_name(f"setting of {name}", key, legal))
    return kind(**settings)


def _show(cards: Sequence[Card], folder: Path) -> None:
    """Print what the report opens with and the summary; write the report, say where it is."""
    from experiments.console import summary
    from experiments.report.opening import opening
    from experiments.report.page import write_report

    console = _console()
    for sentence in opening(cards):
        console.print(f"{sentence}\n", markup=False)
    for part in summary(cards):
        console.print(part)
    typer.echo(f"Report: {write_report(folder).resolve()}")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _limits(given: Sequence[str] | None) -> dict[str, float]:
    """Return limits by measure."""
    found = dict(map(_pair, given or ()))
    for measure, limit in found.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise OverrideError(f"the limit of {measure} is {limit!r}; it must be a number")
    return {measure: float(limit) for measure, limit in found.items()}


def _round(collect: str) -> str | int:
    """Return which round ``--collect`` names."""
    if collect in {"first", "middle", "last"}:
        return collect
    if not collect.isdecimal() or int(collect) < 1:
        raise OverrideError(
            f"--collect {collect!r} must be first, middle, last or a round's number, from 1"
        )
    return int(collect)


def _quiet_flower(*, verbose: bool) -> None:
    """Keep Flower's log to warnings, unless it was asked for."""
    import flwr.common.logger  # noqa: F401  importing it sets the level

    if not verbose:
        logging.getLogger("flwr").setLevel(logging.WARNING)


def _facts(about: Sequence[str] | None, cut: str | None) -> dict[str, Any] | None:
    """Return what is said of a run by ``--about`` and ``--cut``; None for nothing."""
    facts = dict(map(_pair, about or ()))
    if cut is not None:
        facts["cut"] = int(cut) if cut.isdecimal() else cut
    return facts or None


def _pair(override: str) -> tuple[str, Any]:
    """Return the key and value of an ``-o``, read as TOML, else as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OverrideError(f"-o {override!r} must be key=value, such as -o targets=8")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text
