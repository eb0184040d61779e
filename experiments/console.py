"""What the command line shows: progress with the time that remains, and the table at the end.

Progress goes to standard error. On a terminal it is a moving bar; elsewhere, such as in a log, it
is one line a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
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

from experiments.results.cards import Card

if TYPE_CHECKING:
    from experiments.catalogue import Catalogue

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

    def __init__(self, console: Console, *, every: float = 60.0) -> None:
        """Prepare a bar.

        Args:
            console: Where to draw, or on anything but a terminal to write lines.
            every: Seconds from one such line to the next.
        """
        self._console, self._every = console, every
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
        self._ended = Event()
        self._lines = Thread(target=self._line_by_line, daemon=True)

    def __enter__(self) -> Bars:
        self._bars.start()
        if not self._console.is_terminal:
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if self._lines.is_alive():
            self._ended.set()
            self._lines.join()
            self._say_how_far()

    def start(self, total: int, *, left_out: int = 0) -> None:
        """Say how many cells there are, and how many were left out as their parts cannot fit."""
        self._bars.reset(self._task, total=total)
        self._console.print(counted(total, left_out=left_out), soft_wrap=True)

    def advance(self, label: str) -> None:
        """Say that one more cell is done."""
        self._bars.update(self._task, advance=1, description=escape(label))

    def note(self, text: str) -> None:
        """Say what is happening."""
        self._bars.update(self._task, description=escape(text))

    def _line_by_line(self) -> None:
        """Write a line now and then, also while one cell takes long."""
        while not self._ended.wait(self._every):
            self._say_how_far()

    def _say_how_far(self) -> None:
        (task,) = self._bars.tasks
        if task.total is None:
            return
        left = "unknown" if task.time_remaining is None else _clock(task.time_remaining)
        times = f"{_clock(task.elapsed or 0)} gone" + ("" if task.finished else f", {left} left")
        line = f"{escape(f'[{task.completed:g}/{task.total:g}]')} {times}: {task.description}"
        self._console.print(line, soft_wrap=True)


def counted(total: int, *, left_out: int) -> str:
    """Return the line that says how many cells run.

    Args:
        total: Those that run.
        left_out: Those that do not, as their parts cannot fit.

    Returns:
        Both counts in words.
    """
    pairs = "1 more pair" if left_out == 1 else f"{left_out} more pairs"
    rest = (
        f"; {pairs} of a case and an attack or a defence cannot fit, left out" if left_out else ""
    )
    return f"{total} {'cell' if total == 1 else 'cells'}{rest}"


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


class _Scores:
    """The scores of a setting: one table, or several below each other where one is too wide."""

    def __init__(self, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        self._headings, self._lines = headings, lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = [list(column) for column in zip(self._headings, *self._lines, strict=True)]
        # Lines may break between words, and those of headings always do; no word is broken.
        least = min(_longest("\n".join(columns[0]).split()), options.max_width // 2)
        widths = [max(_longest(heading.split()), _longest(column)) for heading, *column in columns]
        taken: list[int] = []
        for place in range(1, len(columns)):
            if taken and least + _wide(widths, [*taken, place]) > options.max_width:
                yield _table(columns, taken, widths, most=options.max_width)
                taken = []
            taken.append(place)
        yield _table(columns, taken, widths, most=options.max_width)


def _table(
    columns: Sequence[Sequence[str]], taken: Sequence[int], widths: Sequence[int], *, most: int
) -> Table:
    """Return a table of the names and of some other columns, as wide as it needs to be."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    natural = _longest("\n".join(columns[0]).splitlines())
    names = min(natural, most - _wide(widths, taken))
    table.add_column(columns[0][0], overflow="fold", width=names)
    for place in taken:
        heading = columns[place][0]
        justify: JustifyMethod = "left" if heading == "control" else "right"
        table.add_column(heading, justify=justify, width=widths[place])
    for line in zip(*(columns[place][1:] for place in (0, *taken)), strict=True):
        table.add_row(*map(escape, line))
    return table


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts))


def _wide(widths: Sequence[int], places: Iterable[int]) -> int:
    """Return how wide some columns are beside the first, with what stands between."""
    return sum(1 + widths[place] for place in places)


def summary(cards: Sequence[Card]) -> Iterable[RenderableType]:
    """Yield the leading scores, setting by setting, and why pairs have none.

    Args:
        cards: Of one experiment.

    Yields:
        The scores of each setting, one row per attack, each beside the best evidence-free
        baseline; then one line for each reason for which a cell failed, training diverged
        or a pair did not fit.
    """
    settings: dict[str, list[Card]] = {}
    for card in cards:
        if card.status in {"done", "unscored"}:
            settings.setdefault(_setting(card), []).append(card)
    columns = {**COLUMNS, **{name: name for card in cards for name in _own_metrics(card)}}
    shown = [name for name in columns if any(name in card.scores for card in cards)]
    for setting, rows in settings.items():
        lines = [
            _row(card, shown, among=[other for other in rows if other.attack == card.attack])
            for card in rows
        ]
        # Not the table's own title, which would wrap at the table's width.
        yield Text(setting, style="bold")
        yield _Scores(["attack", *(columns[name] for name in shown), "control", "utility"], lines)
    if shown:
        yield "In brackets the best guess that needed no message."
    yield from _budget_bound(cards)
    yield from (Text(f"{c.attack}: {c.above_ceiling}") for c in cards if c.above_ceiling)
    noise = [(c.defense, each) for c in cards for each in c.noise_doubts]
    yield from (Text(f"{defense}: {said}") for defense, said in dict.fromkeys(noise))
    for status in ("failed", "diverged", "unfit"):
        reasons = Counter(card.why for card in cards if card.status == status)
        yield from (
            Text(f"{status.capitalize()}, {count} of {len(cards)} cells: {why}")
            for why, count in reasons.items()
        )


def _budget_bound(cards: Sequence[Card]) -> Iterable[str]:
    """Yield what the mark of budget-bound cards means, if any card has it."""
    if any(card.budget_bound for card in cards):
        yield "Budget-bound: a larger budget of the attack may change the scores."


def listing(found: Catalogue) -> Iterable[Table]:
    """Yield one table for each kind of thing that is implemented.

    Args:
        found: From :func:`experiments.catalogue.catalogue`.

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
    bound = "budget-bound" if card.budget_bound else ""
    high = "ABOVE ITS CEILING" if card.above_ceiling else ""
    parts = (card.attack, _variant(card, among), bound, high)
    name = "\n".join(part for part in parts if part)
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


def _own_metrics(card: Card) -> dict[str, bool]:
    """Return the card's metrics of the user's own, and whether more of each is a greater leak."""
    return {
        name: bool(entry["higher_leaks_more"])
        for name, entry in card.scores.items()
        if isinstance(entry, dict) and "higher_leaks_more" in entry
    }


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
    best = max if _own_metrics(card).get(metric, True) else min
    return f"{_shown(metric, mean)} ({_shown(metric, best(free)) if free else _NOTHING})"


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
