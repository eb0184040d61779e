"""What detectors are worth, as a report's table and as text.

``python -m experiments.report_detection FOLDER...`` prints the table for results folders, of single
settings and of all, with the ROC over all and what a calibration on these runs would choose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.detection_rates import Rates, Trial, calibrated, rates, roc
from experiments.measures import value_text
from experiments.report_cells import METRIC_IN_WORDS
from leakbed.cards import Card, read_cards

COLUMNS = (
    "detector",
    "setting",
    "hijacked runs noticed",
    "at gradient",
    "read before",
    "honest runs accused",
    "worst scores, hijacked",
    "honest",
    "area under ROC",
)

_NOTHING = "\N{EN DASH}"
_READ = ("identification", "ssim", "attribute_accuracy")


def detectors(cards: Iterable[Card], *, pooled: bool = False) -> list[tuple[str, ...]]:
    """Return one row for each detector, hijacker and setting, under :data:`COLUMNS`.

    Args:
        cards: Of one experiment.
        pooled: Whether all settings are taken together.

    Returns:
        None at all where no run had a detector.
    """
    found = rates(cards, pooled=pooled)
    names = [entry.first.detector for entry in found]
    several = {
        n for n in names if len({e.first.settings for e in found if e.first.detector == n}) > 1
    }
    return [
        (
            _named(entry, several=entry.first.detector in several),
            f"all {len({trial.where for trial in _all(entry)})}" if pooled else entry.first.where,
            str(entry.true_alarms),
            _steps(entry),
            _read(entry),
            str(entry.false_alarms),
            _range(entry.hijacked),
            _range(entry.honest),
            _NOTHING if entry.area is None else f"{entry.area:.2f}",
        )
        for entry in found
    ]


def noticed(cards: Iterable[Card]) -> list[str]:
    """Return what each detector made of each hijacker and of honest runs, over all settings.

    Args:
        cards: Of one experiment.

    Returns:
        One sentence each; none where no run had a detector.
    """
    said = []
    for entry in rates(cards, pooled=True):
        honest = f"accuses {entry.false_alarms} honest runs"
        if not entry.hijacked:
            said.append(f"{entry.first.detector} {honest}; nobody hijacked one.")
            continue
        when = f", at gradient {_steps(entry)}" if entry.steps else ""
        read = f", by when {_read(entry)} had been read" if entry.before("ssim") else ""
        hijacker = entry.hijacked[0].hijacker
        said.append(
            f"{entry.first.detector} notices {hijacker} in {entry.true_alarms} runs{when}{read}; "
            f"it {honest}."
        )
    return said


def _all(entry: Rates) -> tuple[Trial, ...]:
    return (*entry.hijacked, *entry.honest)


def _named(entry: Rates, *, several: bool) -> str:
    """Return the detector, where need be its settings, and whom it met."""
    own = f" {entry.first.settings}" if several else ""
    against = next((f" against {trial.hijacker}" for trial in entry.hijacked), "")
    return f"{entry.first.detector}{own}{against}"


def _steps(entry: Rates) -> str:
    if entry.steps is None:
        return _NOTHING
    first, middle, last = entry.steps
    return f"{middle:g}" if first == last else f"{middle:g} ({first} to {last})"


def _read(entry: Rates) -> str:
    """Return what was read up to the alarm, the median over the runs."""
    known = {name: entry.before(name) for name in _READ}
    parts = [
        f"{METRIC_IN_WORDS.get(name, name)} {value_text(name, value)}"
        for name, value in known.items()
        if value is not None
    ]
    return ", ".join(parts) or _NOTHING


def _range(runs: Sequence[Trial]) -> str:
    """Return the extremes of the worst scores, and how many runs ended before the first one."""
    scores = [trial.score for trial in runs if trial.score is not None]
    silent = len(runs) - len(scores)
    told = f"{min(scores):.3f} to {max(scores):.3f}" if scores else _NOTHING
    return f"{told}, {silent} without a verdict" if silent else told


def text(cards: Sequence[Card]) -> str:
    """Return both tables, the ROC and what calibration would choose, as Markdown.

    Args:
        cards: Of one experiment.

    Returns:
        Lines.
    """
    rows = [*detectors(cards), *detectors(cards, pooled=True)]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_choices(cards), ""])


def _choices(cards: Sequence[Card]) -> list[str]:
    said = []
    for entry in rates(cards, pooled=True):
        if entry.area is not None:
            points = "; ".join(f"{at:.3f}: {hit:.2f}, {miss:.2f}" for at, hit, miss in roc(entry))
            said.append(f"{entry.first.detector}, score: true, false alarms: {points}")
        if (level := calibrated(entry)) is not None:
            said.append(f"{entry.first.detector}, one honest run in a hundred: {level:.4f}")
    return said


def main(folders: Sequence[str]) -> None:
    """Print what the cards of results folders say of detectors.

    Args:
        folders: Each holds ``cards``.
    """
    sys.stdout.write(text([card for folder in folders for card in read_cards(Path(folder))]))


if __name__ == "__main__":
    main(sys.argv[1:])
