"""The door to the testbed: ``run``, ``train``, ``check`` and ``results``; its modules by name.

The package ``leakbed`` is the lowest layer and is also shipped alone. So the packages above it are
loaded by name when a function needs them; where they are missing, the error says how to get them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leakbed.errors import OURS

if TYPE_CHECKING:
    from pandas import DataFrame

_ROOT = Path(__file__).resolve().parents[1]


class MissingTestbedError(ImportError):
    """A package that experiments need is not installed; the message says how to get it."""


def run(
    settings: Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Any = None,  # noqa: ANN401  its class lives in the testbed
    verbose: bool = False,
) -> list[Any]:
    """Run every cell of an experiment that has no card yet.

    Bad settings raise a ``SettingsError`` (a ``ValueError`` of one line per fault) before anything
    is trained; a missing package raises :class:`MissingTestbedError`.

    Args:
        settings: A settings file, what such a file would hold, or checked settings. A mapping may
            hold objects where a file has names: ``{"model": net, "attack": [Grey(grey=0.2)]}``.
        out: The results folder; ``runs/<name>`` if None.
        overrides: ``key=value`` pairs that replace settings, such as ``data.nodes=8``.
        progress: An ``experiments.run.executor.Progress``: told how far the run is.
        verbose: Whether Flower's log is shown; otherwise its warnings alone.

    Returns:
        The cards of all cells, old and new: ``experiments.results.cards.Card``.
    """
    checked = testbed("experiments.settings.load").load_settings(settings, overrides)
    folder = None if out is None else Path(out)
    runner = testbed("experiments.run.runner")
    from leakbed.flower_internals import flower_log  # noqa: PLC0415  `--help` needs no Flower

    with nullcontext() if verbose else flower_log():
        cards: list[Any] = runner.run(checked, out=folder, progress=progress)
    return cards


def train(*, model: object, data: object, **settings: Any) -> Any:  # noqa: ANN401  as run has it
    """Train once under the wiretap, in memory, to attack it: what a notebook begins with.

    What does not fit raises as in :func:`experiments.notebook.train`, which says all settings.

    Args:
        model: A network, a class or function that makes one, a catalogue key or an import path.
        data: A torch Dataset or list of (image, label) pairs, arrays as (images, labels), a
            ``leakbed.Table``, a function, a catalogue key or an import path.
        **settings: ``protocol``, ``defense``, ``verbose``, ``seed``, and keys of the sections
            ``data``, ``model`` and ``protocol``, such as ``cut`` and ``nodes``.

    Returns:
        An ``experiments.notebook.Run``: ``smashed``, ``cut_gradients``, ``updates``, ``truth`` and
        ``attack``.
    """
    return testbed("experiments.notebook").train(model=model, data=data, **settings)


def check(plugin: str | type) -> list[str]:
    """Say in what an attack or a defence breaks its contract, tried on small tensors.

    A path that cannot be imported is an :class:`~leakbed.lookup.ImportPathError`.

    Args:
        plugin: ``package.module:Class``, the short name of an installed package's, or a class.

    Returns:
        One phrase for each breach; empty where it keeps the contract.
    """
    found: list[str] = testbed("experiments.catalogue").check_plugin(plugin)
    return found


def results(folder: str | Path, *, by_seed: bool = False) -> DataFrame:
    """Return the results of a folder's last run as a pandas data frame.

    A folder without results, or of cards that this version does not read, is a ``ValueError`` that
    says what to do; a missing package raises :class:`MissingTestbedError`.

    Args:
        folder: The results folder, the ``out`` of a run.
        by_seed: Whether each seed has a row of its own; by default seeds are pooled.

    Returns:
        A row for each row of the report, a column for each setting that differs between them, and
        for each score with its interval and the best guess that read no message.
    """
    records = testbed("experiments.report.export").records(Path(folder), by_seed=by_seed)
    return testbed("pandas").DataFrame.from_records(records)


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
