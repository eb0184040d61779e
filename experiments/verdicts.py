"""What must be said against a number: baselines it does not beat, published figures it misses.

Also the reasons not to believe it: a control that failed, a card marked unreliable, failed targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from experiments.imbalance import leading
from experiments.measures import Measure, difference, number, pooled, text, value_text
from experiments.report_cells import METRIC_IN_WORDS, SMASHED_PICTURE, Cell
from leakbed.cards import Card
from leakbed.metrics import HIGHER_LEAKS_MORE

_NEAREST = "nearest-public"
_HONEST = {
    "never_hijacked": "the same adversary with a client that was never hijacked",
    "honest_probe": "a linear probe of honest smashed data that was told half of the truth",
}
_CONTROL = "the negative control beats its baseline in "
_FEW = 2  # losses that one sentence lists; more are counted


def place(cell: Cell, among: Sequence[Cell]) -> str:
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


def shortfall(same: Sequence[Cell], scored: Sequence[Cell]) -> str:
    """Say where one attack does not beat what needs no attack.

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
    return "It beats everything that needs no attack, in every leading score." * (contests > 0)


def _listed(lost: Sequence[str]) -> str:
    more = len(lost) - _FEW
    return "; ".join(lost[:_FEW]) + (f"; and {more} more comparisons" if more > 0 else "")


def _contests(cell: Cell, scored: Sequence[Cell]) -> Iterable[tuple[str, str, Measure]]:
    """Yield every rival of a cell: its name, the metric, and its measure."""
    picture = next((each for each in scored if _is_picture_of(each, cell)), None)
    for metric in leading([cell]):
        if metric not in cell.measures:
            continue
        if picture is not None and metric in picture.measures:
            yield "the smashed map shown as a picture", metric, picture.measures[metric]
        if (free := _guess(cell, metric)) is not None:
            yield f"the {free[0]} baseline", metric, free[1]
        for name, rival in _HONEST.items():
            if (honest := _beside(cell, name, metric)) is not None:
                yield rival, metric, honest
        if (nearest := cell.baselines(metric).get(_NEAREST)) is not None and metric == "ssim":
            error = cell.baseline_error(metric)
            yield "the nearest public image", metric, Measure(mean=nearest, stderr=error)


def _beside(cell: Cell, name: str, metric: str) -> Measure | None:
    """Return what is read of honest training beside an active adversary, where that was tried."""
    tables = [(card.control or {}).get(name) for card in cell.cards]
    return pooled([table for table in tables if isinstance(table, Mapping)], metric)


def beats_guessing(cell: Cell, metric: str) -> bool:
    """Say whether a cell's score beats its best evidence-free baseline by two standard errors.

    Args:
        cell: Has a score of the metric.
        metric: Its name.

    Returns:
        ``False`` also where no such baseline is known, since nothing was beaten then.
    """
    free = _guess(cell, metric)
    return free is not None and _beats(metric, cell.measures[metric], free[1])


def _guess(cell: Cell, metric: str) -> tuple[str, Measure] | None:
    """Return the best evidence-free baseline of a cell: its name and its measure."""
    free = cell.baseline(metric)
    if free is None:
        return None
    return free[0], Measure(mean=free[1], stderr=cell.baseline_error(metric))


def _is_picture_of(other: Cell, cell: Cell) -> bool:
    card, own = other.first, cell.first
    return card.attack == SMASHED_PICTURE and (
        (other.case, card.protocol, card.model, card.data, card.cut, card.defense)
        == (cell.case, own.protocol, own.model, own.data, own.cut, own.defense)
    )


def _beats(metric: str, own: Measure, theirs: Measure) -> bool:
    gap = difference(own, theirs)
    return gap is not None and (gap > 0) == HIGHER_LEAKS_MORE[metric]


def misses(attacks: Sequence[Cell]) -> list[str]:
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


def diverged(found: Sequence[Cell]) -> list[str]:
    """Say which runs have no score since their training left the finite numbers.

    Args:
        found: All cells.

    Returns:
        One sentence, or none.
    """
    ended: dict[str, dict[int, bool]] = {}
    for cell in found:
        for card in cell.cards if cell.first.status in {"done", "diverged"} else ():
            # Attacks share a run, of which each has a card; an active one has a run of its own.
            ended.setdefault(_run(cell), {})[card.seed] = card.status == "diverged"
    counts = [
        f"{sum(lost.values())} of {len(lost)} ({run})"
        for run, lost in ended.items()
        if any(lost.values())
    ]
    if not counts:
        return []
    return [f"Runs that diverged have no score and are in no average: {'; '.join(counts)}."]


def _run(cell: Cell) -> str:
    """Return what tells a cell's training run from others, but for its seed."""
    card = cell.first
    by = f", under {card.attack}" if card.threat and card.threat.active else ""
    cut = "" if cell.cut is None else f", cut {cell.cut}"
    defense = "" if card.defense == "none" else f", {card.defense}"
    return f"{cell.case}, {card.protocol}, {card.model} on {card.data}{cut}{defense}{by}"


def caveats(scored: Sequence[Cell]) -> list[str]:
    """Say which numbers should not be believed and why, and which targets failed.

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
    return said


def doubts(cell: Cell) -> list[str]:
    """Return why a cell should not be believed; failed targets are counted elsewhere."""
    reasons = [reason for text in cell.unreliable for reason in text.split("; ")]
    found = [_in_words(reason) for reason in reasons if not reason.endswith("targets failed")]
    if cell.control_within is False and not any("negative control" in each for each in found):
        found.append(_in_words(_CONTROL + ", ".join(_above(cell))))
    return list(dict.fromkeys(found))


def _in_words(reason: str) -> str:
    """Return a card's reason with its metrics named as the tables name them."""
    if not reason.startswith(_CONTROL):
        return reason
    above = reason.removeprefix(_CONTROL).split(", ")
    return _CONTROL + ", ".join(METRIC_IN_WORDS.get(name, name) for name in above)


def _above(cell: Cell) -> list[str]:
    """Return the metrics in which any seed's control failed."""
    found: dict[str, None] = {}
    for card in cell.cards:
        above = (card.control or {}).get("above")
        found |= dict.fromkeys(str(name) for name in above) if isinstance(above, list) else {}
    return list(found)


def _crowd(names: Sequence[str]) -> str:
    more = len(names) - _FEW
    return "; ".join(names[:_FEW]) + (f"; and {more} more" if more > 0 else "")


def _called(cell: Cell) -> str:
    card = cell.first
    cut = "" if cell.cut is None else f", cut {cell.cut}"
    defense = "" if card.defense == "none" else f", {card.defense}"
    variant = f", {cell.variant}" if cell.variant else ""
    return f"{card.attack} ({cell.case}, {card.model} on {card.data}{cut}{defense}{variant})"
