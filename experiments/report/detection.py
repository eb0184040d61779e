"""What detectors are worth: true and false alarms with exact intervals, detection steps, the ROC.

``python -m experiments.report.detection FOLDER...`` prints the table for results folders, of single
settings and of all, with the ROC over all and what a calibration on these runs would choose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from defenses import DEFENSES
from experiments.report.rows import METRIC_IN_WORDS, unseeded
from experiments.report.statistics import value_text
from experiments.results.cards import Card, read_cards
from experiments.results.folder import last_run
from leakbed.oracle.metrics import binomial_interval
from leakbed.plugins import picked

_RUN = (
    "seed",
    "data",
    "model",
    "protocol",
    "defense",
    "device",
)  # settings that make an honest run
_RARE = 0.01  # share of honest runs that a calibrated threshold gives up


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run under one detector; of several nodes the first alarm and the worst score.

    Attributes:
        detector: Its catalogue key.
        settings: Its own settings, as text.
        hijacker: Catalogue key of the adversary; empty for an honest run.
        where: The experiment's name of the setting, without its seed.
        seed: The cell's.
        alarm: After how many gradients of its node the alarm came; None where it did not.
        score: The most suspicious one; None where the run ended before the first.
        before: What the adversary read at its last checkpoint up to the alarm, by metric.
    """

    detector: str
    settings: str
    hijacker: str
    where: str
    seed: int
    alarm: int | None = None
    score: float | None = None
    before: Mapping[str, float] | None = None

    @property
    def suspicion(self) -> float:
        """The score, turned so that higher is more suspicious; NaN where there is none."""
        if self.score is None:
            return float("nan")
        return (
            self.score
            if picked(self.detector, DEFENSES, "defence").suspicious == "high"
            else -self.score
        )


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many runs raised an alarm.

    Attributes:
        alarms: Those that did.
        runs: All of them.
    """

    alarms: int
    runs: int

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval; everything where there is no run."""
        return binomial_interval(self.alarms, self.runs) if self.runs else (0.0, 1.0)

    def __str__(self) -> str:
        low, high = (f"{100 * end:.0f}" for end in self.interval)
        return f"{self.alarms} of {self.runs} ({low} to {high} %)" if self.runs else "no run"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One detector against one hijacker in one setting, beside the honest runs of that setting.

    Attributes:
        hijacked: Runs in which the hijacker forged.
        honest: Runs in which nobody did.
    """

    hijacked: tuple[Trial, ...]
    honest: tuple[Trial, ...]

    @property
    def first(self) -> Trial:
        """Any of the runs, for what they have in common."""
        return (*self.hijacked, *self.honest)[0]

    @property
    def true_alarms(self) -> Rate:
        """How many of the hijacked runs were noticed."""
        return _rate(self.hijacked)

    @property
    def false_alarms(self) -> Rate:
        """How many of the honest runs were taken for hijacked ones."""
        return _rate(self.honest)

    @property
    def steps(self) -> tuple[int, float, int] | None:
        """First, median and last step at which a hijacked run was noticed."""
        found = [trial.alarm for trial in self.hijacked if trial.alarm is not None]
        return (min(found), median(found), max(found)) if found else None

    @property
    def area(self) -> float | None:
        """Area under the ROC of the worst scores; None without scores of both kinds."""
        truth, suspicion = _scored(self)
        return float(roc_auc_score(truth, suspicion)) if len(set(truth)) > 1 else None

    def before(self, metric: str) -> float | None:
        """Return what was read before the alarm, the median over the runs that know.

        Args:
            metric: Of a checkpoint.

        Returns:
            None where no run knows.
        """
        known = [trial.before for trial in self.hijacked if trial.before is not None]
        values = [point[metric] for point in known if metric in point]
        return median(values) if values else None


def trials(cards: Iterable[Card]) -> list[Trial]:
    """Return every run under every detector once, however many attacks read it.

    An honest run is one that a passive attack read, or the control run beside a hijacked one: with
    equal settings and seed the two are the same run.

    Args:
        cards: Of any experiment; those without detectors are ignored.

    Returns:
        In the order of the cards.
    """
    found: dict[str, Trial] = {}
    for card in cards:
        hijacked = bool(card.detection.get("hijacked"))
        adversary = card.settings.get("adversary") if hijacked else None
        _add(found, card, card.detection, hijacker=card.attack if hijacked else "", own=adversary)
        if isinstance(beside := (card.control or {}).get("detection"), dict):
            _add(found, card, beside, hijacker="", own=None)
    return list(found.values())


def rates(cards: Iterable[Card], *, pooled: bool = False) -> list[Rates]:
    """Return true and false alarms by detector, hijacker and setting.

    Args:
        cards: Of any experiment.
        pooled: Whether all settings are taken together.

    Returns:
        One entry for each hijacker; one without hijacked runs where only honest ones are known.
    """
    everything = trials(cards)
    places = {_place(trial, pooled=pooled): None for trial in everything}
    found = []
    for place in places:
        here = [trial for trial in everything if _place(trial, pooled=pooled) == place]
        honest = tuple(trial for trial in here if not trial.hijacker)
        names = dict.fromkeys(trial.hijacker for trial in here if trial.hijacker)
        for name in names or {"": None}:
            hijacked = tuple(trial for trial in here if name and trial.hijacker == name)
            found.append(Rates(hijacked=hijacked, honest=honest))
    return found


def roc(entry: Rates) -> list[tuple[float, float, float]]:
    """Return the ROC of the worst scores: threshold, true and false alarms, as shares.

    Args:
        entry: With runs of both kinds that have a score.

    Returns:
        In order of falling strictness.
    """
    truth, suspicion = _scored(entry)
    false, true, threshold = roc_curve(truth, suspicion)
    turn = 1.0 if picked(entry.first.detector, DEFENSES, "defence").suspicious == "high" else -1.0
    return [
        (turn * float(at), float(hit), float(miss))
        for at, hit, miss in zip(threshold, true, false, strict=True)
        if np.isfinite(at)
    ]


def calibrated(entry: Rates) -> float | None:
    """Return the score that one honest run in a hundred would pass in the suspicious direction.

    Args:
        entry: Its honest runs alone are read, and should not be those reported.

    Returns:
        The most suspicious honest score, of under a hundred runs; None where none has a score.
    """
    known = [trial.suspicion for trial in entry.honest if trial.score is not None]
    if not known:
        return None
    level = float(np.quantile(known, 1 - _RARE, method="higher"))
    return (
        level if picked(entry.first.detector, DEFENSES, "defence").suspicious == "high" else -level
    )


def _add(
    found: dict[str, Trial], card: Card, detection: Mapping[str, Any], *, hijacker: str, own: object
) -> None:
    """Add a run's trials, one for each detector, unless they are known."""
    nodes = detection.get("nodes", {}).values()
    for name, settings in dict(card.settings.get("defense", {}).get("stack", [])).items():  # type: ignore[union-attr,arg-type]
        findings = [node[name] for node in nodes if name in node]
        if not findings:
            continue
        run = [name, hijacker, _forging(own), [card.settings.get(key) for key in _RUN]]
        found.setdefault(
            json.dumps(run, sort_keys=True),
            Trial(
                detector=name,
                settings=json.dumps(settings, sort_keys=True),
                hijacker=hijacker,
                where=unseeded(card.case),
                seed=card.seed,
                **_merged(name, findings),
            ),
        )


def _forging(own: object) -> object:
    """Return what of an adversary's settings the nodes can notice."""
    return {k: v for k, v in own.items() if k != "checkpoint_every"} if isinstance(own, dict) else 0


def _merged(name: str, findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first alarm of several nodes, and their worst score."""
    alarmed = [each for each in findings if each["alarm"] is not None]
    first = min(alarmed, key=lambda each: each.get("iteration") or each["alarm"], default=None)
    scores = [each["score"] for each in findings if each["score"] is not None]
    worst = max if picked(name, DEFENSES, "defence").suspicious == "high" else min
    return {
        "alarm": None if first is None else first["alarm"],
        "score": worst(scores, default=None),
        "before": None if first is None else first.get("before"),
    }


def _place(trial: Trial, *, pooled: bool) -> tuple[str, str, str]:
    return trial.detector, trial.settings, "" if pooled else trial.where


def _rate(runs: Sequence[Trial]) -> Rate:
    return Rate(alarms=sum(trial.alarm is not None for trial in runs), runs=len(runs))


def _scored(entry: Rates) -> tuple[list[int], list[float]]:
    """Return which runs were hijacked, and their suspicion, of those that have a score."""
    known = [trial for trial in (*entry.hijacked, *entry.honest) if trial.score is not None]
    return [int(bool(trial.hijacker)) for trial in known], [trial.suspicion for trial in known]


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
        known = any(entry.before(metric) is not None for metric in _READ)
        read = f", by when {_read(entry)} had been read" if known else ""
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
    """Return both tables, the ROC and what calibration would choose, as Markdown."""
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
    """Print what the last runs of results folders say of detectors.

    A folder whose last run cannot be told is a :class:`experiments.results.folder.ReportError`.

    Args:
        folders: Each holds ``cards``.
    """
    found = [
        card for folder in map(Path, folders) for card in last_run(folder, read_cards(folder))[1]
    ]
    sys.stdout.write(text(found))


if __name__ == "__main__":
    main(sys.argv[1:])
