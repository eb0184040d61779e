"""The Python interface under the command line: run, attack, report and list.

This package is the lowest layer and is also shipped alone, so the testbed's packages are loaded by
name when a function needs them; where they are missing, the error says how to get them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from leakbed.errors import OURS

if TYPE_CHECKING:
    from experiments.results.cards import Card

_ROOT = Path(__file__).resolve().parents[1]

FLAGSHIP = _ROOT / "experiments" / "studies" / "fl_vs_split" / "settings.toml"
"""The experiment of ``leakbed compare``."""


class MissingTestbedError(ImportError):
    """A package that experiments need is not installed; the message says how to get it."""


class ScaleError(ValueError):
    """An experiment has no settings of the scale asked for."""


class ResultsFolderError(ValueError):
    """Results cannot be written where they should go."""


class Progress(Protocol):
    """Who is told how far a run is."""

    def start(self, total: int, *, left_out: int = 0) -> None:
        """Say how many cells there are, and how many were left out as their parts cannot fit."""
        ...

    def advance(self, label: str) -> None:
        """Say that one more cell is done."""
        ...

    def note(self, text: str) -> None:
        """Say what is happening."""
        ...


class Checked(Protocol):
    """Checked settings, from :func:`check`; their classes live in the testbed."""

    @property
    def name(self) -> str:
        """The experiment's name."""
        ...


class Ceilings(Protocol):
    """The ceilings of a recorded run, from :func:`ceiling`."""

    @property
    def value(self) -> float:
        """Their mean over messages."""
        ...

    @property
    def error(self) -> float:
        """Its standard error."""
        ...

    def table(self) -> dict[str, Any]:
        """Return all of it, as JSON has it."""
        ...

    def lines(self) -> list[str]:
        """Return it as text."""
        ...


class Audited(Protocol):
    """What an audit of a defence found, from :func:`audit_defense`."""

    @property
    def holds(self) -> bool:
        """Whether the claim was not refuted."""
        ...


class Found(Protocol):
    """What an audit of an app found, from :func:`audit`."""

    @property
    def assumed(self) -> Sequence[str]:
        """What was taken for true, and how it was found."""
        ...

    @property
    def leaks(self) -> Sequence[str]:
        """What can be read off the messages without any search."""
        ...

    @property
    def unfit(self) -> Mapping[str, str]:
        """Attacks that do not fit, and why."""
        ...

    @property
    def cards(self) -> Sequence[Card]:
        """Results of those that do."""
        ...


class Violation(Protocol):
    """A limit held against a result."""

    def line(self) -> str:
        """Return it as one line."""
        ...


class Judged(Protocol):
    """Results held against limits, from :func:`gate`."""

    @property
    def verdict(self) -> str:
        """``pass``, ``fail`` or ``not evaluable``."""
        ...

    @property
    def findings(self) -> Sequence[Violation]:
        """Of every limit and result."""
        ...

    def write(self, folder: Path) -> None:
        """Write them as JSON, JUnit and SARIF, without pictures or values of anybody's."""
        ...


class Entry(TypedDict):
    """One thing that is implemented.

    Attributes:
        line: What it is.
        settings: Its settings and their defaults, as text.
    """

    line: str
    settings: dict[str, str]


Catalogue = dict[str, dict[str, Entry]]
"""Kind (``"attacks"``, ``"data sets"``, ...) to name to entry."""


def run(
    settings: Checked | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Card]:
    """Run every cell of an experiment that has no card yet.

    Bad settings raise a ``SettingsError`` (a ``ValueError`` of one line per fault) before anything
    is trained; a missing package raises :class:`MissingTestbedError`.

    Args:
        settings: A settings file, what such a file would hold, or checked settings.
        out: The results folder; ``runs/<name>`` if None.
        overrides: ``key=value`` pairs that replace settings, such as ``data.nodes=8``.
        progress: Told how far the run is.

    Returns:
        The cards of all cells, old and new.
    """
    checked = check(settings, overrides)
    folder = writable(results_folder(checked) if out is None else Path(out))
    with alone(folder):
        runner = testbed("experiments.run.runner")
        cards: list[Card] = runner.run(checked, out=folder, progress=progress)
    return cards


def check(
    settings: Checked | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> Checked:
    """Return an experiment's settings, checked; imports no torch.

    Args:
        settings: As for :func:`run`.
        overrides: As for :func:`run`.

    Returns:
        Every key present and legal.
    """
    checked: Checked = testbed("experiments.settings.load").load_settings(settings, overrides)
    return checked


def at_scale(file: str | Path, scale: str) -> Path:
    """Return the settings of an experiment at another scale: ``<scale>.toml`` beside its file.

    Args:
        file: The experiment's settings.
        scale: Such as ``"paper"``, the setting of the source rather than of a small machine.

    Returns:
        The other file.

    Raises:
        ScaleError: There is none; the message names those that are there.
    """
    found = Path(file).with_name(f"{scale}.toml")
    if not found.is_file() or found.name == Path(file).name:
        others = sorted(each.stem for each in Path(file).parent.glob("*.toml"))
        have = ", ".join(name for name in others if name != Path(file).stem) or "none"
        raise ScaleError(f"{file} has no settings at scale {scale!r} ({found}); it has: {have}")
    return found


def results_folder(checked: Checked) -> Path:
    """Return where an experiment's results go unless told otherwise: ``runs/<name>``."""
    return Path("runs") / checked.name


def attack_trace(
    trace: str | Path,
    name: str,
    *,
    answers: str | Path | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str = "auto",
    model: str | None = None,
    about: Mapping[str, Any] | None = None,
    truth: str | None = None,
) -> Card:
    """Attack a recorded trace.

    A network of somebody's own that the trace names is imported only where ``model`` permits it:
    otherwise an :class:`~leakbed.tap.facts.UnpermittedModelError`, a ``ValueError``.

    Args:
        trace: The trace's folder.
        name: The attack's catalogue key.
        answers: The run's answer key; without it the card is marked ``unscored``.
        out: The results folder; beside the trace if None.
        settings: The attack's settings.
        seed: What the attack is drawn from; that of the run if None, which gives the numbers of the
            run's own card, or 0 where neither the answers nor the run's folder around the trace say
            what it was.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:0"``, ...
        model: The network, ``package.module:Class`` or a catalogue key, in place of the one that
            the trace says; importing it runs that code, so one that only a trace names is not
            imported unasked.
        about: What else to take for true of the run, in place of what the trace says: arguments of
            :func:`leakbed.tap.facts.about`, such as ``batch_size``.
        truth: ``package.module:function`` that returns the data of a partition as its node fed
            them, ``(images, labels)`` or a ``DataLoader``; scores the attack without answers.

    Returns:
        The card, which names both seeds and the device.
    """
    card: Card = testbed("experiments.run.offline").attack_trace(
        Path(trace),
        name,
        answers=None if answers is None else Path(answers),
        out=None if out is None else writable(Path(out)),
        settings=settings,
        seed=seed,
        device=device,
        model=model,
        about=about,
        truth=truth,
    )
    return card


def ceiling(
    run: str | Path,
    *,
    collect: str | int = "last",
    when: str = "training",
    targets: int = 8,
    candidates: int = 1000,
    draws: int = 4,
    later: bool = False,
    model: str | None = None,
) -> Ceilings:
    """Return what the messages of a recorded run give away to the best possible guess.

    What keeps a number from being a bound is a ``NoCeilingError``, a ``ValueError``.

    Args:
        run: The run's own folder, with its trace and its answer key.
        collect: The round: ``"first"``, ``"middle"``, ``"last"`` or its number.
        when: Of smashed rows: those of ``"training"`` or of ``"inference"``.
        targets: How many messages at most.
        candidates: Among how many rows a guess names one.
        draws: Of the noise, for each of them.
        later: Whether the guesser reads the node's later smashed batches of the round too.
        model: As for :func:`attack_trace`.

    Returns:
        Ceilings by message, their mean, and what the check of the recorded noise found.
    """
    found: Ceilings = testbed("experiments.run.ceilings").ceiling_of_run(
        Path(run),
        collect=collect,
        when=when,
        targets=targets,
        candidates=candidates,
        draws=draws,
        later=later,
        model=model,
    )
    return found


def audit_defense(
    name: str, *, settings: Mapping[str, Any] | None = None, draws: int | None = None
) -> list[Audited]:
    """Hold a defence's claim of differential privacy against draws from it.

    A defence that claims nothing is a ``NoAuditError``, a ``ValueError``.

    Args:
        name: Its catalogue key, or ``package.module:Class`` of one's own.
        settings: The defence's.
        draws: Of each of two worst inputs; None for as many as take seconds.

    Returns:
        One result for each kind of input; its text says whether the claim was refuted.
    """
    found: list[Audited] = testbed("experiments.run.audit_defense").audit_defense(
        name, settings=settings or {}, draws=draws
    )
    return found


def audit(
    app: str | Path,
    *,
    out: str | Path | None = None,
    nodes: int = 2,
    limit: float = 600,
    model: str | None = None,
    about: Mapping[str, Any] | None = None,
    attacks: Sequence[str] = (),
    iterations: int = 300,
) -> Found:
    """Run a copy of somebody's Flower app as it stands, and attack what it sends.

    An app that cannot be run, or whose network is not found, is an ``AppError``, a ``ValueError``.

    Args:
        app: Its folder, or a bundle built of it (``.fab``).
        out: The results folder; ``runs/audit-<name>`` if None.
        nodes: How many nodes to run it on.
        limit: Seconds that it may take.
        model: Its network, ``package.module:Name``; looked for if None.
        about: Facts of the run in place of what is seen of it, as for :func:`attack_trace`.
        attacks: Keys of the catalogue; all if empty.
        iterations: Of each search for images.

    Returns:
        What was assumed and found.
    """
    folder = Path("runs") / f"audit-{Path(app).resolve().stem}" if out is None else Path(out)
    with alone(writable(folder)):
        found: Found = testbed("experiments.app_audit.app").audit_app(
            Path(app),
            folder.resolve(),
            nodes=nodes,
            limit=limit,
            model=model,
            about=about,
            attacks=tuple(attacks),
            iterations=iterations,
        )
    return found


def gate(
    results: str | Path,
    *,
    most: Mapping[str, float] | None = None,
    least: Mapping[str, float] | None = None,
    baseline: str | Path | None = None,
    decides: str = "not named",
) -> Judged:
    """Hold a folder of results against limits.

    Limits that mean nothing are a ``GateError``, a ``ValueError``.

    Args:
        results: Of an audit, an attack or a run.
        most: Limits of measures of which more is more leakage, such as ``identification``.
        least: Of measures of which less is more leakage, such as ``mse``.
        baseline: Earlier results, which are not to be exceeded.
        decides: Who decides by this, for the file.

    Returns:
        ``pass``, ``fail`` or ``not evaluable``, with a finding for every limit and result.
    """
    judged: Judged = testbed("experiments.app_audit.gate").gate(
        Path(results),
        most=most or {},
        least=least or {},
        baseline=None if baseline is None else Path(baseline),
        decides=decides,
    )
    return judged


def report(folder: str | Path) -> Path:
    """Write ``report.html`` into a results folder and return it.

    Args:
        folder: Holds ``cards``; one without any raises a ``ReportError``, a ``ValueError``.

    Returns:
        The file. It shows private samples and is for the owner of the private data.
    """
    written: Path = testbed("experiments.report.page").write_report(Path(folder))
    return written


def catalogue() -> Catalogue:
    """Return everything that is implemented: data sets, models, protocols, attacks, defences."""
    found: Catalogue = testbed("experiments.catalogue").catalogue()
    return found


def writable(folder: Path) -> Path:
    """Make a results folder, or refuse it before anything has run.

    Args:
        folder: Where results should go.

    Returns:
        The same folder, which exists.

    Raises:
        ResultsFolderError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsFolderError(
            f"results cannot go to {folder}: {error.strerror}; name another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ResultsFolderError(f"results cannot go to {folder}: it is not writable by you")
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a results folder; the lock ends with the process, however that ends.

    Args:
        folder: Exists and is writable.

    Yields:
        Nothing.

    Raises:
        ResultsFolderError: Another run is writing there.
    """
    import fcntl  # noqa: PLC0415  not on every system that this package alone is used on

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsFolderError(
                f"another run is writing to {folder}; wait until it ends, or name another folder"
            ) from None
        yield


def testbed(name: str) -> ModuleType:
    """Import a module of the testbed.

    Args:
        name: Its dotted name.

    Returns:
        The module.

    Raises:
        MissingTestbedError: It is not beside this package, or a package it needs is missing.
    """
    _find_ours_first(name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingTestbedError(
            f"experiments need the package {error.name!r}, which is not installed; run `make "
            "setup` in Leakbed's repository, or `pip install --editable '.[testbed]'` there (for "
            "`flwr run`: in the environment that its SuperLink and SuperNodes are started from)"
        ) from error


def _find_ours_first(wanted: str) -> None:
    """Let the testbed's packages be found before others of their names, such as ``attacks.py``."""
    hiding = _hiding()
    if hiding and all((_ROOT / name / "__init__.py").is_file() for name in hiding):
        for name in hiding:
            taken = getattr(sys.modules.get(name), "__file__", None)
            if taken is not None and _ROOT not in Path(taken).resolve().parents:
                raise MissingTestbedError(
                    f"{taken} was imported as {name!r}, a name that Leakbed's own package has; "
                    "rename it"
                )
        sys.path.insert(0, str(_ROOT))
        importlib.invalidate_caches()
        if hiding := _hiding():
            sys.path.remove(str(_ROOT))
    if hiding:
        name = wanted if wanted in hiding else next(iter(hiding))
        raise MissingTestbedError(
            f"experiments need Leakbed's repository, and {_ROOT} has no importable {name!r} "
            f"(found: {hiding[name]}); clone it, run `make setup` there, and use its "
            ".venv/bin/leakbed"
        )


def _hiding() -> dict[str, str]:
    """Return the testbed's packages that are not found beside this one, and what is instead."""
    found = {}
    for name in sorted(OURS - {"leakbed"}):
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module that somebody made without one
            spec = None
        places = [] if spec is None else list(spec.submodule_search_locations or ())
        if _ROOT / name not in (Path(place).resolve() for place in places):
            found[name] = "nothing" if spec is None else str(spec.origin or places)
    return found
