"""What must be said against a number: baselines it does not beat, published figures it misses.

Also the reasons not to believe it: a control that failed, a card marked unreliable, failed targets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.report.rows import (
    METRIC_IN_WORDS,
    SEEDED,
    SMASHED_PICTURE,
    Row,
    differing,
    leading,
)
from experiments.report.statistics import Measure, difference, number, pooled, text, value_text
from experiments.results.cards import Card
from leakbed.oracle import CONTROL_FAILS
from leakbed.oracle.metrics import HIGHER_LEAKS_MORE
from leakbed.oracle.rivals import (
    OWN_CLASSIFIER,
    OWN_NEAREST,
    PUBLIC_CLASSIFIER,
    PUBLIC_NEAREST,
    UNTRAINED,
)

_NEAREST = "nearest-public"
IN_WORDS = {
    OWN_CLASSIFIER: (
        "a classifier (logistic regression) of the party's own inputs, learned from the same known "
        "labels without any message"
    ),
    OWN_NEAREST: (
        "the label of the nearest known one among the party's own inputs, without any message"
    ),
    PUBLIC_CLASSIFIER: (
        "a classifier (logistic regression) of the party's own inputs, learned from public "
        "labelled images without any message"
    ),
    PUBLIC_NEAREST: (
        "the label of the public image nearest to the party's own input, without any message"
    ),
    UNTRAINED: "the same attack on a network that was never trained",
}
"""Baselines that look at the attacked samples, as a sentence names them."""
_HONEST = {
    "never_hijacked": "the same adversary with a client that was never hijacked",
    "honest_probe": "a linear probe of honest smashed data that was told half of the truth",
}
_EVASION = "misclassification"
_ANOTHER_BOTTOM = "the same attack on the messages of another bottom"
_FEW = 2  # losses that one sentence lists; more are counted


def place(cell: Row, among: Sequence[Row]) -> str:
    """Say which of several settings a cell is, by what tells them apart.

    Args:
        cell: The cell to name.
        among: The cells it must be told from, itself included.

    Returns:
        A phrase such as ``at cut 3``; empty for a single cell.
    """
    parts = []
    cuts = {each.cut for each in among}
    if len(cuts) > 1:
        parts.append("with weights exchanged whole" if cell.cut is None else f"at cut {cell.cut}")
    if len({(each.case, each.cut) for each in among}) > len(cuts):
        parts.append(f"in {cell.case}")
    if cell.variant:
        parts.append(f"with {cell.variant}")
    return " ".join(parts)


def shortfall(same: Sequence[Row], scored: Sequence[Row]) -> str:
    """Say where one attack does not beat what needs no attack.

    Altered inputs must be told from their control as well: what the same attack makes of another
    bottom's messages owes nothing to those that were read.

    Args:
        same: Cells of one attack.
        scored: Every scored cell, the ``smashed-as-image`` ones among them.

    Returns:
        One sentence that names every rival it does not beat everywhere; that it beats them all,
        if it does; empty where there is nothing to compare with.
    """
    losses: dict[str, list[str]] = {}
    contests = 0
    for cell in same:
        where = place(cell, same)
        for rival, metric, theirs in _contests(cell, scored):
            contests += 1
            own = cell.measures[metric]
            if not _beats(metric, own, theirs):
                numbers = f"{METRIC_IN_WORDS[metric]} {value_text(metric, own.mean)}"
                against = f"against {value_text(metric, theirs.mean)} {where}".rstrip()
                losses.setdefault(rival, []).append(f"{numbers} {against}")
    if losses:
        rivals = ", ".join(f"{rival} ({_listed(lost)})" for rival, lost in losses.items())
        return f"It does not beat, by two standard errors, {rivals}."
    if any(_EVASION in cell.measures and _of_another_bottom(cell) is None for cell in same):
        return (
            "What it does on the messages of another bottom is not known, so it is not said to "
            "beat what needs no attack."
        )
    return "It beats everything that needs no attack, in every leading score." * (contests > 0)


def _listed(lost: Sequence[str]) -> str:
    more = len(lost) - _FEW
    return "; ".join(lost[:_FEW]) + (f"; and {more} more comparisons" if more > 0 else "")


def _contests(cell: Row, scored: Sequence[Row]) -> Iterable[tuple[str, str, Measure]]:
    """Yield every rival of a cell: its name, the metric, and its measure."""
    picture = next((each for each in scored if _is_picture_of(each, cell)), None)
    for metric in leading([cell]):
        if metric not in cell.measures:
            continue
        if picture is not None and metric in picture.measures:
            yield "the smashed map shown as a picture", metric, picture.measures[metric]
        for rival, free in _without_attack(cell, metric):
            yield rival, metric, free
        if metric == _EVASION and (other := _of_another_bottom(cell)) is not None:
            yield _ANOTHER_BOTTOM, metric, other
        for name, rival in _HONEST.items():
            if (honest := _beside(cell, name, metric)) is not None:
                yield rival, metric, honest


def _without_attack(cell: Row, metric: str) -> Iterable[tuple[str, Measure]]:
    """Yield the best baseline, all that look at the samples, and the nearest public image."""
    best = cell.baseline(metric)
    names = [*([] if best is None else [best[0]]), *IN_WORDS, *([_NEAREST] * (metric == "ssim"))]
    for name in dict.fromkeys(names):
        if (free := cell.baseline_measure(metric, name)) is not None:
            words = {**IN_WORDS, _NEAREST: "the nearest public image"}
            yield words.get(name, f"the {name} baseline"), free


def _beside(cell: Row, name: str, metric: str) -> Measure | None:
    """Return what is read of honest training beside an active adversary, where that was tried."""
    tables = [(card.control or {}).get(name) for card in cell.cards]
    return pooled([table for table in tables if isinstance(table, Mapping)], metric)


def _of_another_bottom(cell: Row) -> Measure | None:
    """Return what the control of altered inputs misclassifies; None unless every seed has one.

    A card keeps its rate alone: of single hits and misses, which have an error, it says how many.
    """
    tables = []
    for card in cell.cards:
        held, targets = (card.control or {}).get("scores"), number(card.scores.get("targets"))
        rate = number(held.get(_EVASION)) if isinstance(held, Mapping) else None
        if rate is None or targets is None:
            return None
        wrong = round(rate * targets)
        hits = [1.0] * wrong + [0.0] * (int(targets) - wrong)
        tables.append({_EVASION: {"mean": rate, "values": hits}})
    return pooled(tables, _EVASION)


def beats_guessing(cell: Row, metric: str) -> bool:
    """Say whether a cell's score beats its best evidence-free baseline by two standard errors.

    Args:
        cell: Has a score of the metric.
        metric: Its name.

    Returns:
        ``False`` also where no such baseline is known, since nothing was beaten then.
    """
    best = cell.baseline(metric)
    free = None if best is None else cell.baseline_measure(metric, best[0])
    return free is not None and _beats(metric, cell.measures[metric], free)


def _is_picture_of(other: Row, cell: Row) -> bool:
    card, own = other.first, cell.first
    return card.attack == SMASHED_PICTURE and (
        (other.case, card.protocol, card.model, card.data, card.cut, card.defense)
        == (cell.case, own.protocol, own.model, own.data, own.cut, own.defense)
    )


def _beats(metric: str, own: Measure, theirs: Measure) -> bool:
    gap = difference(own, theirs)
    return gap is not None and (gap > 0) == HIGHER_LEAKS_MORE[metric]


def misses(attacks: Sequence[Row]) -> list[str]:
    """Say which published figures were not reached, and which were.

    Args:
        attacks: Scored cells, of which the undefended count; a card's ``reported`` is read where
            it is a table of our metrics.

    Returns:
        One sentence per figure.
    """
    said = []
    for cell in (each for each in attacks if each.first.defense == "none"):
        for metric, figure in published(cell.first).items():
            own = cell.measures.get(metric)
            if own is None or metric not in METRIC_IN_WORDS:
                continue
            said.append(
                f"{_called(cell)} {_reached(metric, own, figure)} the published "
                f"{METRIC_IN_WORDS[metric]} of {value_text(metric, figure)}: {text(metric, own)}."
            )
    return said


def _reached(metric: str, own: Measure, figure: float) -> str:
    """Return the verb for a measure beside a published figure."""
    higher = HIGHER_LEAKS_MORE.get(metric, True)
    if (own.mean >= figure) == higher or own.mean == figure:
        return "reaches"
    return "misses" if difference(own, Measure(mean=figure, stderr=0.0)) else "may reach"


def published(card: Card) -> dict[str, float]:
    """Return the source's own figures of a card by metric; empty where they are no such table."""
    if not isinstance(card.reported, Mapping):
        return {}
    found = {name: number(value) for name, value in card.reported.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(kw_only=True)
class _Runs:
    """Training runs that differ in their seed alone, and of which seeds they diverged."""

    name: str
    settings: Mapping[str, Any]
    lost: dict[int, bool] = field(default_factory=dict)

    def told(self, every: Iterable[_Runs]) -> str:
        """Return the name, and by which settings they differ from others of that name."""
        among = [each.settings for each in every if each.name == self.name]
        apart = differing(self.settings, among)
        return f"{self.name}, {apart}" if apart else self.name


def diverged(found: Sequence[Row]) -> list[str]:
    """Say which runs have no score since their training left the finite numbers."""
    runs: dict[tuple[str, str], _Runs] = {}
    for cell in found:
        if cell.first.status in {"done", "diverged"}:
            # Attacks share a run, of which each has a card; an active one has a run of its own.
            skipped = {*SEEDED, "attack"}
            own = {k: value for k, value in cell.first.settings.items() if k not in skipped}
            key = _run(cell), json.dumps(own, sort_keys=True)
            run = runs.setdefault(key, _Runs(name=_run(cell), settings=own))
            run.lost |= {card.seed: card.status == "diverged" for card in cell.cards}
    counts = [
        f"{sum(run.lost.values())} of {len(run.lost)} ({run.told(runs.values())})"
        for run in runs.values()
        if any(run.lost.values())
    ]
    if not counts:
        return []
    return [f"Runs that diverged have no score and are in no average: {'; '.join(counts)}."]


def _run(cell: Row) -> str:
    """Return what tells a cell's training run from others, but for its seed."""
    card = cell.first
    by = f", under {card.attack}" if card.threat and card.threat.active else ""
    cut = "" if cell.cut is None else f", cut {cell.cut}"
    defense = "" if card.defense == "none" else f", {card.defense}"
    return f"{cell.case}, {card.protocol}, {card.model} on {card.data}{cut}{defense}{by}"


def caveats(scored: Sequence[Row]) -> list[str]:
    """Say which numbers should not be believed and why, which targets failed, what is budget-bound.

    Args:
        scored: Scored cells, attacks or not.

    Returns:
        One sentence per reason.
    """
    reasons: dict[str, list[str]] = {}
    for cell in scored:
        for reason in doubts(cell):
            reasons.setdefault(reason, []).append(_called(cell))
    said = [f"Do not trust {_crowd(names)}: {reason}." for reason, names in reasons.items()]
    broken = [cell for cell in scored if cell.failures]
    if broken:
        counts = [f"{cell.failures} of {cell.targets} in {_called(cell)}" for cell in broken]
        said.append(f"Targets that broke down count as failures: {_crowd(counts)}.")
    if bound := [_called(cell) for cell in scored if cell.budget_bound]:
        said.append(
            f"A larger budget of the attack may change budget-bound scores: {_crowd(bound)}."
        )
    return said


def doubts(cell: Row) -> list[str]:
    """Return why a cell should not be believed; failed targets are counted elsewhere."""
    reasons = [reason for text in cell.unreliable for reason in text.split("; ")]
    found = [_in_words(reason) for reason in reasons if not reason.endswith("targets failed")]
    found += cell.above_ceiling
    if cell.control_within is False and not any(each.startswith(CONTROL_FAILS) for each in found):
        found.append(_in_words(CONTROL_FAILS + ", ".join(_above(cell))))
    return list(dict.fromkeys(found))


def _in_words(reason: str) -> str:
    """Return a card's reason with its metrics named as the tables name them."""
    if not reason.startswith(CONTROL_FAILS):
        return reason
    above = reason.removeprefix(CONTROL_FAILS).split(", ")
    return CONTROL_FAILS + ", ".join(METRIC_IN_WORDS.get(name, name) for name in above)


def _above(cell: Row) -> list[str]:
    """Return the metrics in which any seed's control failed."""
    found: dict[str, None] = {}
    for card in cell.cards:
        above = (card.control or {}).get("above")
        found |= dict.fromkeys(str(name) for name in above) if isinstance(above, list) else {}
    return list(found)


def _crowd(names: Sequence[str]) -> str:
    more = len(names) - _FEW
    return "; ".join(names[:_FEW]) + (f"; and {more} more" if more > 0 else "")


def _called(cell: Row) -> str:
    card = cell.first
    cut = "" if cell.cut is None else f", cut {cell.cut}"
    defense = "" if card.defense == "none" else f", {card.defense}"
    variant = f", {cell.variant}" if cell.variant else ""
    return f"{card.attack} ({cell.case}, {card.model} on {card.data}{cut}{defense}{variant})"
