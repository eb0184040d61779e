"""The Python interface under the command line: run, attack, report and list.

This package is the lowest layer and is also shipped alone, so the testbed's packages are loaded by
name when a function needs them; where they are missing, the error says how to get them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

if TYPE_CHECKING:
    from leakbed.cards import Card

_ROOT = Path(__file__).resolve().parents[1]

FLAGSHIP = _ROOT / "experiments" / "fl_vs_split" / "settings.toml"
"""The experiment of ``leakbed compare``."""


class MissingTestbedError(ImportError):
    """A package that experiments need is not installed; the message says how to get it."""


class ResultsFolderError(ValueError):
    """Results cannot be written where they should go."""


class Progress(Protocol):
    """Who is told how far a run is."""

    def start(self, total: int) -> None:
        """Say how many cells there are."""
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
        runner = testbed("experiments.runner")
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
    checked: Checked = testbed("experiments.settings_file").load_settings(settings, overrides)
    return checked


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
) -> Card:
    """Attack a recorded trace.

    Args:
        trace: The trace's folder.
        name: The attack's catalogue key.
        answers: The run's answer key; without it the card is marked ``unscored``.
        out: The results folder; beside the trace if None.
        settings: The attack's settings.

    Returns:
        The card.
    """
    card: Card = testbed("experiments.offline").attack_trace(
        Path(trace),
        name,
        answers=None if answers is None else Path(answers),
        out=None if out is None else writable(Path(out)),
        settings=settings,
    )
    return card


def report(folder: str | Path) -> Path:
    """Write ``report.html`` into a results folder and return it.

    Args:
        folder: Holds ``cards``; one without any raises a ``ReportError``, a ``ValueError``.

    Returns:
        The file. It shows private samples and is for the owner of the private data.
    """
    written: Path = testbed("experiments.report").write_report(Path(folder))
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
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or _ROOT / package not in map(Path, spec.submodule_search_locations or ()):
        raise MissingTestbedError(
            f"experiments need Leakbed's repository, and {_ROOT} has no importable {package!r}; "
            "clone it, run `make setup` there, and use its .venv/bin/leakbed"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingTestbedError(
            f"experiments need the package {error.name!r}, which is not installed; run `make "
            "setup` in Leakbed's repository, or `pip install --editable '.[testbed]'` there (for "
            "`flwr run`: in the environment that its SuperLink and SuperNodes are started from)"
        ) from error
