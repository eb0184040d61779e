"""Two results folders side by side: which settings differ, which scores, and which for sure.

Each result of the one is set beside the result of the other, under the same attack, from which it
differs in the fewest settings; where the folders have no attack in common, two attacks on the same
victim are. A score counts as different where it is so by two standard errors: of targets or of
seeds, whichever is more, and of a rate no less than its exact interval allows. Otherwise it is not
told apart. The two are taken as independent, so results of the same seeds and samples are compared
more cautiously than they need be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from experiments.report.caveats import doubts
from experiments.report.export import names_of, settings_of
from experiments.report.rows import METRIC_IN_WORDS, Row, cells, read_last_run
from experiments.report.statistics import Measure, difference, text, value_text
from experiments.report.tables import setting
from experiments.results.folder import ReportError
from leakbed.oracle.metrics import HIGHER_LEAKS_MORE

_VICTIM = ("protocol", "data", "model", "cut")
_SHARE = "label_accuracy"  # as which an accuracy is printed
_UNLIKE = 1e6  # more than any count of settings: a pair that is no pair
_CHANCE = "about one score in 20 differs that much by chance"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One score of two results.

    Attributes:
        metric: As a report names it.
        first: Of the first folder.
        second: Of the second.
        verdict: What may be said of the two.
    """

    metric: str
    first: str
    second: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two results side by side.

    Attributes:
        first: What the first folder's is called.
        second: What the second's is.
        settings: Name, value in the first and value in the second of what differs.
        scores: That both have.
        notes: Reasons not to trust one of them, and whether other code computed it.
    """

    first: str
    second: str
    settings: list[tuple[str, Any, Any]]
    scores: list[Change]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What tells two results folders apart.

    Attributes:
        everywhere: Settings that differ by the same two values in every pair.
        pairs: Results side by side, without these settings.
        only_first: What the second folder has no result beside.
        only_second: The reverse.
    """

    everywhere: list[tuple[str, Any, Any]]
    pairs: list[Pair]
    only_first: list[str]
    only_second: list[str]

    def lines(self) -> list[str]:
        """Return it as text."""
        said = [f"Differs everywhere: {_told(each)}" for each in self.everywhere]
        if not said and not any(pair.settings for pair in self.pairs):
            said = ["No setting differs."]
        for pair in self.pairs:
            same = pair.first == pair.second
            said += ["", pair.first if same else f"{pair.first}  |  {pair.second}"]
            said += [f"  {_told(each)}" for each in pair.settings]
            said += [f"  {c.metric}: {c.first} | {c.second}: {c.verdict}" for c in pair.scores]
            said += [f"  Note: {note}" for note in pair.notes]
        said += [""] + [f"Only in the first: {name}" for name in self.only_first]
        said += [f"Only in the second: {name}" for name in self.only_second]
        every = [change for pair in self.pairs for change in pair.scores]
        clear = sum(change.verdict != _SAME for change in every)
        said.append(f"{clear} of {len(every)} scores are told apart; {_CHANCE}.")
        return said


_SAME = "not told apart"


def _told(each: tuple[str, Any, Any]) -> str:
    name, *values = each
    first, second = ("unset" if value is None else json.dumps(value) for value in values)
    return f"{name}: {first} | {second}"


def differences(first: Path, second: Path) -> Differences:
    """Compare the last runs of two results folders.

    A folder without results is a :class:`~experiments.results.folder.ReportError` too, one of
    another version's cards a :class:`~experiments.results.cards.CardError`.

    Args:
        first: A results folder.
        second: Another.

    Returns:
        Settings and scores side by side.

    Raises:
        ReportError: They have nothing that could be compared.
    """
    ours, theirs = _scored(first), _scored(second)
    couples = _couples(ours, theirs)
    if not couples:
        raise ReportError(
            f"{first} and {second} have nothing in common: neither an attack nor a victim "
            f"(protocol, data, model, cut). In the first {_summary(ours)}; in the second "
            f"{_summary(theirs)}. Name two folders that share one of them"
        )
    pairs = [_pair(a, b) for a, b in couples]
    if not any(pair.scores for pair in pairs):
        raise ReportError(
            f"the results of {first} and {second} have no score in common: the first has "
            f"{_metrics(ours)}; the second {_metrics(theirs)}"
        )
    shared = [each for each in pairs[0].settings if all(each in pair.settings for pair in pairs)]
    return Differences(
        everywhere=shared,
        pairs=[
            Pair(
                first=pair.first,
                second=pair.second,
                settings=[each for each in pair.settings if each not in shared],
                scores=pair.scores,
                notes=pair.notes,
            )
            for pair in pairs
        ],
        only_first=[_name(row) for row in ours if not any(row is a for a, _ in couples)],
        only_second=[_name(row) for row in theirs if not any(row is b for _, b in couples)],
    )


def _scored(folder: Path) -> list[Row]:
    found = cells(read_last_run(Path(folder)).cards)
    scored = [row for row in found if row.first.status == "done" and row.measures]
    if not scored:
        raise ReportError(f"nothing was scored in {folder}; `leakbed report {folder}` says why")
    return scored


def _couples(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the pairs that differ in the fewest settings altogether, in the order of the first."""
    attacks = {row.first.attack for row in ours} & {row.first.attack for row in theirs}
    known = [[_settings(row) for row in side] for side in (ours, theirs)]
    cost = np.full((len(ours), len(theirs)), _UNLIKE)
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            alike = a.first.attack == b.first.attack if attacks else _victim(a) == _victim(b)
            if alike:
                cost[i, j] = len(_changed(known[0][i], known[1][j]))
    chosen = zip(*linear_sum_assignment(cost), strict=True)
    return [(ours[i], theirs[j]) for i, j in chosen if cost[i, j] < _UNLIKE]


def _settings(row: Row) -> dict[str, Any]:
    """Return all that a row was run with, its seeds and the code's version among it."""
    seeds = sorted(card.seed for card in row.cards)
    run = {"seeds": seeds, "version": row.first.version}
    return names_of(row) | settings_of(row) | run


def _changed(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name and both values of every setting that differs; ``None`` where it is not set."""
    return [
        (key, first.get(key), second.get(key))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _victim(row: Row) -> tuple[object, ...]:
    return tuple(names_of(row)[name] for name in _VICTIM)


def _pair(a: Row, b: Row) -> Pair:
    notes = [f"first: {each}" for each in doubts(a)] + [f"second: {each}" for each in doubts(b)]
    if {card.source for card in a.cards} != {card.source for card in b.cards}:
        notes.append("computed by other code, which may be why scores differ")
    return Pair(
        first=_name(a),
        second=_name(b),
        settings=_changed(_settings(a), _settings(b)),
        scores=_changes(a, b),
        notes=notes,
    )


def _changes(a: Row, b: Row) -> list[Change]:
    """Return the scores that both have, and what is left of the task."""
    higher = {**b.own_metrics, **a.own_metrics, **HIGHER_LEAKS_MORE}
    found = []
    for metric in (*METRIC_IN_WORDS, *a.own_metrics):
        before, after = a.measures.get(metric), b.measures.get(metric)
        if before is not None and after is not None:
            ends = "the second leaks more", "the second leaks less"
            change = Change(
                metric=METRIC_IN_WORDS.get(metric, metric),
                first=text(metric, before),
                second=text(metric, after),
                verdict=_verdict(before, after, ends if higher.get(metric, True) else ends[::-1]),
            )
            found.append(change)
    first, second = a.utility(), b.utility()
    if first is not None and second is not None and first[0] == second[0]:
        ends = "the second learns more", "the second learns less"
        values = [
            text(_SHARE, left) if left.stderr is not None else value_text(_SHARE, left.mean)
            for _, left in (first, second)
        ]
        verdict = _verdict(first[1], second[1], ends)
        found.append(Change(metric=first[0], first=values[0], second=values[1], verdict=verdict))
    return found


def _verdict(before: Measure, after: Measure, ends: tuple[str, str]) -> str:
    gap = difference(after, before)
    return _SAME if gap is None else ends[gap < 0]


def _name(row: Row) -> str:
    return f"{row.first.attack}, {setting(row)}"


def _summary(rows: Sequence[Row]) -> str:
    attacks = ", ".join(dict.fromkeys(row.first.attack for row in rows))
    victims = ", ".join(
        dict.fromkeys(f"{r.first.model} on {r.first.data} ({r.first.protocol})" for r in rows)
    )
    return f"{attacks} attacked {victims}"


def _metrics(rows: Sequence[Row]) -> str:
    known = dict.fromkeys(name for row in rows for name in (*METRIC_IN_WORDS, *row.own_metrics))
    return ", ".join(name for name in known if any(name in row.measures for row in rows))
