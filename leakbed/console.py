"""What the command line shows: progress with the time that remains, and the table at the end.

Progress goes to standard error and is a moving bar only on a terminal; in a log it is one line per
cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from leakbed.api import Catalogue
from leakbed.cards import Card

COLUMNS = {
    "identification": "identified",
    "abs_pearson": "|Pearson|",
    "ssim": "SSIM",
    "label_accuracy": "labels",
    "leak_auc": "leak AUC",
    "cluster_accuracy": "labels, best naming (upper bound)",
    "attribute_accuracy": "attribute",
    "class_rate": "of the class",
}
"""The leading scores; of all of them more is a greater leak."""

_RATES = (
    "identification",
    "label_accuracy",
    "cluster_accuracy",
    "attribute_accuracy",
    "class_rate",
)
_NEEDS_TRUTH = ("nearest-public", "real-images")
_PATIENCE = 3600.0  # seconds over which the speed is averaged: a cell may take many minutes
_NOTHING = "\N{EN DASH}"


class Bars:
    """Progress on a console; a context manager."""

    def __init__(self, console: Console) -> None:
        """Prepare a bar.

        Args:
            console: Where to draw, or on anything but a terminal to write lines.
        """
        self._console = console
        self._done, self._total = 0, 0
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_PATIENCE,
        )
        self._task = self._bars.add_task("starting", total=None)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, total: int) -> None:
        """Say how many cells there are."""
        self._done, self._total = 0, total
        self._bars.update(self._task, total=total)

    def advance(self, label: str) -> None:
        """Say that one more cell is done."""
        self._done += 1
        self._bars.update(self._task, advance=1, description=escape(label))
        if not self._console.is_terminal:
            self._console.print(f"[{self._done}/{self._total}] {label}", markup=False)

    def note(self, text: str) -> None:
        """Say what is happening."""
        self._bars.update(self._task, description=escape(text))
        if not self._console.is_terminal:
            self._console.print(text, markup=False)


def summary(cards: Sequence[Card]) -> Iterable[Table | Text | str]:
    """Yield the leading scores, setting by setting, and why pairs have none.

    Args:
        cards: Of one experiment.

    Yields:
        One table for each setting, one row per attack, each score beside the best evidence-free
        baseline; then one line for each reason for which a pair did not fit.
    """
    settings: dict[str, list[Card]] = {}
    for card in cards:
        if card.status != "unfit":
            settings.setdefault(_setting(card), []).append(card)
    shown = [name for name in COLUMNS if any(name in card.scores for card in cards)]
    for setting, rows in settings.items():
        table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
        # Wide enough for every name; only the settings below one wrap on a narrow terminal.
        table.add_column("attack", overflow="fold", min_width=16)
        for name in shown:
            table.add_column(COLUMNS[name], justify="right", no_wrap=True, min_width=11)
        table.add_column("control", no_wrap=True, min_width=7)
        table.add_column("utility", justify="right", no_wrap=True)
        for card in rows:
            same = [other for other in rows if other.attack == card.attack]
            table.add_row(*map(escape, _row(card, shown, among=same)))
        # Not the table's own title, which would wrap at the table's width.
        yield Text(setting, style="bold")
        yield table
    if shown:
        yield "In brackets the best guess that needed no message."
    unfit = Counter(card.why for card in cards if card.status == "unfit")
    yield from (
        Text(f"Unfit, {count} of {len(cards)} cells: {why}") for why, count in unfit.items()
    )


def listing(found: Catalogue) -> Iterable[Table]:
    """Yield one table for each kind of thing that is implemented.

    Args:
        found: From :func:`leakbed.api.catalogue`.

    Yields:
        Name, what it is, and its settings with their defaults.
    """
    for kind, entries in found.items():
        table = Table(title=kind, title_justify="left", title_style="bold", box=None)
        table.show_header = False
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, entry in entries.items():
            settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
            words = "\n".join(part for part in (entry["line"], settings) if part)
            table.add_row(escape(name), escape(words))
        yield table


def _setting(card: Card) -> str:
    """Return what a card's training run is called."""
    parts = [
        card.case,
        "" if card.protocol in card.case else card.protocol,
        "" if card.cut is None or "cut=" in card.case else f"cut {card.cut}",
        _defense(card),
    ]
    return ", ".join(part for part in parts if part)


def _row(card: Card, shown: Sequence[str], *, among: Sequence[Card]) -> list[str]:
    scores = [_score(card, name) for name in shown]
    control = _control(card) if card.status == "done" else card.status
    name = "\n".join(part for part in (card.attack, _variant(card, among)) if part)
    return [name, *scores, control, _utility(card.utility)]


def _variant(card: Card, among: Sequence[Card]) -> str:
    """Say in which settings of its attack a card differs from its namesakes."""
    others = [_settings(other) for other in among]
    return ", ".join(
        f"{name} {value}"
        for name, value in _settings(card).items()
        if any(other.get(name) != value for other in others)
    )


def _settings(card: Card) -> Mapping[str, object]:
    """Return the settings of a card's attack: its own, and those that every attack has."""
    attack = card.settings.get("attack")
    if not isinstance(attack, dict):
        return {}
    own = attack.get("own")
    shared = {name: value for name, value in attack.items() if name != "own"}
    return {**own, **shared} if isinstance(own, dict) else shared


def _defense(card: Card) -> str:
    """Return a card's defences with the settings they were given."""
    settings: Any = card.settings.get("defense") or {}
    given = [own for _, own in settings.get("stack", ())]
    strength = ", ".join(f"{name} {value}" for own in given for name, value in own.items())
    name = "no defence" if card.defense == "none" else card.defense
    return f"{name} ({strength})" if strength else name


def _score(card: Card, metric: str) -> str:
    """Return a score and, in brackets, the best baseline that needs neither evidence nor truth."""
    entry = card.scores.get(metric)
    mean = _number(entry.get("mean")) if isinstance(entry, dict) else None
    if mean is None:
        return _NOTHING
    free = [
        value
        for name, table in card.baselines.items()
        if name not in _NEEDS_TRUTH and (value := table.get(metric)) is not None
    ]
    return f"{_shown(metric, mean)} ({_shown(metric, max(free)) if free else _NOTHING})"


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.0f}%" if metric in _RATES else f"{value:.2f}"


def _control(card: Card) -> str:
    if card.unreliable is not None:
        return "doubted"
    within = (card.control or {}).get("within")
    return _NOTHING if within is None else "holds" if within else "fails"


def _utility(utility: Mapping[str, Any]) -> str:
    for name in ("test_accuracy", "accuracy", *utility):
        if (value := _number(utility.get(name))) is not None:
            return _shown("label_accuracy", value)
    return _NOTHING


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
