"""How a report opens: one figure of accuracy against leakage, and three sentences on it.

The figure has a panel for each kind of adversary. A line is the ceiling of one case as its defence
is swept; rounds have panels of their own where one panel would hold too many lines, since a ceiling
of the first round says nothing of the last. The sentences compare the two families of protocols
where both learn the same, by what the best possible guess reads, not by what today's attacks do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from experiments.report.figures import Curve, Drawing, Mark, panel
from experiments.report.rows import METRIC_IN_WORDS, Family, Row, cells, grouped
from experiments.report.statistics import text, value_text
from experiments.results.cards import Bound, Card
from experiments.settings.plugins import round_number
from leakbed.contracts import Evidence

_SHOWN = ("identification", "label_accuracy", "attribute_accuracy", "class_rate")
"""Shares of what is private, of which a panel shows the first that its cells have."""
_UP = {"identification": "private rows named", "label_accuracy": "private labels read"}
_NEAR = 0.03  # how far apart two accuracies are at most that count as the same
_MOST = 6  # lines that are still told apart in one panel
_MOMENTS = {"last": "last round", "first": "first round", "middle": "middle round"}
_SEATS = {"server": "To the server", "client": "To a node", "eavesdropper": "To an eavesdropper"}
_GUESS = "best guess without a message"


def opening(cards: Iterable[Card]) -> list[str]:
    """Say who gives away more, to whom, at what accuracy, and what the best guess is told.

    Of each family that exchanges weights or splits the network the lowest ceiling of the last
    round's messages counts, of all that learn the most that both reach, within three points. One
    of the two is said to leak more only where the ceilings differ by two standard errors.

    Args:
        cards: Of one experiment.

    Returns:
        Three sentences; one where both families have ceilings but do not learn the same; none
        where not both have one.
    """
    scored = [cell for cell in cells(cards) if cell.first.status == "done"]
    known: dict[Family, list[_Met]] = {"weights": [], "split": []}
    for cell in scored:
        met = _Met.of(cell)
        if met is not None and _moment(cell) == _MOMENTS["last"]:
            known[cell.family].append(met)
    if not all(known.values()):
        return []
    pair = _meeting(known["weights"], known["split"])
    if pair is None:
        most = [max(each.accuracy for each in own) for own in known.values()]
        return [
            f"Weight exchange learns {_percent(most[0])} here at most and split learning "
            f"{_percent(most[1])}, and no two of them are within three points of accuracy, so "
            "their ceilings are not compared."
        ]
    return [_who(*pair), _whom(*pair, scored=scored), _told(*pair)]


@dataclass(frozen=True, kw_only=True)
class _Met:
    """A cell that has a ceiling and a test accuracy."""

    cell: Row
    bound: Bound
    accuracy: float
    ceiling: float
    error: float

    @classmethod
    def of(cls, cell: Row) -> _Met | None:
        utility, found, bound = cell.utility(), cell.ceiling, cell.first.ceiling
        if utility is None or found is None or bound is None:
            return None
        return cls(
            cell=cell, bound=bound, accuracy=utility[1].mean, ceiling=found[0], error=found[1]
        )

    @property
    def value(self) -> str:
        """The ceiling in percent, with two standard errors to either side."""
        low = max(self.ceiling - 2 * self.error, 0.0)
        high = min(self.ceiling + 2 * self.error, 1.0)
        places = 1 if 0 < 100 * (high - low) < 2 else 0  # noqa: PLR2004  the ends would be one
        ends = f"{100 * low:.{places}f} to {100 * high:.{places}f}%"
        return f"{100 * self.ceiling:.{places}f}% ({ends})"

    @property
    def words(self) -> str:
        """The case, and what it is defended with."""
        card = self.cell.first
        own = "" if card.defense == "none" else f", {card.defense} {_strength(card)}".rstrip()
        return f"{self.cell.case}{own}"


def _meeting(weights: Sequence[_Met], split: Sequence[_Met]) -> tuple[_Met, _Met] | None:
    """Return the lowest ceilings of both families where they learn the most that both reach."""
    reach = _NEAR + 1e-9
    pairs = [(a, b) for a in weights for b in split if abs(a.accuracy - b.accuracy) <= reach]
    most = max((min(a.accuracy, b.accuracy) for a, b in pairs), default=0.0)
    # Two points more of accuracy are within the error of its measure.
    near = [(a, b) for a, b in pairs if min(a.accuracy, b.accuracy) >= most - reach]
    return min(near, key=lambda pair: pair[0].ceiling + pair[1].ceiling, default=None)


def _who(weights: _Met, split: _Met) -> str:
    """Say who gives away more at what accuracy, or that the ceilings do not differ."""
    gap = split.ceiling - weights.ceiling
    clear = abs(gap) > max(2 * hypot(weights.error, split.error), 1e-9)
    more = "split learning" if gap > 0 else "weight exchange"
    verdict = f"{more} gives away more" if clear else "neither family clearly gives away more"
    rows = weights.bound.guesses or 1
    behind = "of one row" if rows == 1 else f"of {rows} rows, by a list of as many names,"
    return (
        f"At the same accuracy ({_percent(split.accuracy)} split, {_percent(weights.accuracy)} by "
        f"weight exchange) {verdict}: the best possible guess names the row behind a message at "
        f"the cut {split.value} of the time, and a row behind an update {behind} {weights.value}."
    )


def _whom(weights: _Met, split: _Met, *, scored: Sequence[Row]) -> str:
    """Say who reads it, how far today's attacks are, and what is the worst case of updates."""
    read = [
        f"{reached} {where}"
        for met, where in ((split, "at the cut"), (weights, "behind the update"))
        if (reached := _reached(met.cell, scored))
    ]
    attacks = f"; of the attacks run on these messages {' and '.join(read)}" if read else ""
    seats = list(dict.fromkeys(met.bound.seat or "server" for met in (split, weights)))
    to = f"Both are told to the {seats[0]}" if len(seats) == 1 else f"To {' and '.join(seats)}"
    return f"{to}, which only follows the protocol{attacks}.{_worst(weights, scored)}"


def _reached(cell: Row, scored: Sequence[Row]) -> str:
    """Return what the strongest attack on a cell's messages names; empty where none was run."""
    same = [
        each
        for each in scored
        if _messages(each) == _messages(cell)
        and each.is_attack
        and "identification" in each.measures
    ]
    if not same:
        return ""
    best = _strongest(same)
    share = text("identification", best.measures["identification"])
    return f"{best.first.attack} names {share} of the rows"


def _worst(weights: _Met, scored: Sequence[Row]) -> str:
    """Name the case of the same network, and the round, in which most is read of an update."""
    own = weights.cell
    rivals = [
        cell
        for cell in scored
        if cell.family == "weights"
        and cell.is_attack
        and cell.case != own.case
        and "identification" in cell.measures
        and cell.utility() is not None
        and (cell.first.model, cell.first.data) == (own.first.model, own.first.data)
    ]
    if not rivals:
        return ""
    worst = _strongest(rivals)
    tried = {_moment(cell) for cell in rivals if cell.case == worst.case}
    tied = [each for each in rivals if (each.case, _named(each)) == (worst.case, _named(worst))]
    moments = list(dict.fromkeys(_moment(cell) for cell in sorted(tied, key=_round)))
    beside = f"the worst of the {len(tried)}" if len(moments) < len(tried) else "all that were"
    there = "there" if len(moments) == 1 else f"in {_in_words([_moment(worst)])}"
    utility = worst.utility()
    return (
        f" Of the other updates most is read of “{worst.case}” in {_in_words(moments)}"
        f"{f', {beside} attacked' if len(tried) > 1 else ''}: {worst.first.attack} names "
        f"{text('identification', worst.measures['identification'])} of the rows {there}; that "
        f"model ended at {_percent(utility[1].mean if utility else 0.0)} accuracy."
    )


def _strongest(attacked: Sequence[Row]) -> Row:
    """Return what names most; of equals, what did on most rows, then the first by its name."""
    return min(
        attacked,
        key=lambda each: (
            -_named(each),
            -each.targets,
            each.case,
            each.first.attack,
            _round(each),
        ),
    )


def _named(cell: Row) -> float:
    """Return the share of rows that are named, without what rounding adds to a mean."""
    return round(cell.measures["identification"].mean, 9)


def _in_words(moments: Sequence[str]) -> str:
    """Return rounds as one phrase, such as ``the first round and round 4``."""
    *rest, last = [each if each.startswith("round") else f"the {each}" for each in moments]
    return f"{', '.join(rest)} and {last}" if rest else last


def _told(weights: _Met, split: _Met) -> str:
    """Say what the guesser knows, and what it would name by chance."""
    rows = list(dict.fromkeys(met.bound.candidates for met in (split, weights)))
    among = " and ".join(f"{count:,}" for count in rows if count is not None) or "all"
    told = weights.bound.told or "all but the row and the noise"
    places = (split, "at the cut"), (weights, "behind the update")
    chances = [f"{_percent(met.bound.chance or 0.0)} {where}" for met, where in places]
    return (
        f"The best possible guess is told {told}, and chooses among {among} rows, of which chance "
        f"names {' and '.join(chances)}. That is more than an attack on such a message knows, "
        "so none names more, but by luck. In brackets are two standard errors of a guess, and 95% "
        "intervals of an attack."
    )


def _strength(card: Card) -> str:
    """Return the numbers of a defence's settings as words, in a stack with the defences' names."""
    numbers = _numbers(card)
    several = len({name for name, _, _ in numbers}) > 1
    return ", ".join(f"{f'{name} ' * several}{key} {value:g}" for name, key, value in numbers)


def _size(cell: Row) -> tuple[bool, tuple[float, ...]]:
    """Order the settings of a sweep: no defence first, then by its numbers."""
    return cell.first.defense != "none", tuple(value for _, _, value in _numbers(cell.first))


def _numbers(card: Card) -> list[tuple[str, str, float]]:
    """Return defence, key and value of the numbers among a stack's settings."""
    defense: Any = card.settings.get("defense") or {}
    return [
        (name, key, float(value))
        for name, own in defense.get("stack", ())
        for key, value in own.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _percent(share: float) -> str:
    tiny = 0 < share < 0.1  # noqa: PLR2004  under a tenth a point is much
    return f"{100 * share:.1f}%" if tiny else value_text("identification", share)


def panels(scored: Sequence[Row]) -> list[Drawing]:
    """Draw the figure's panels, one for each kind of adversary.

    Args:
        scored: Cells with scores.

    Returns:
        Figures, those with ceilings first; none at all where no utility was measured.
    """
    shown = [cell for cell in scored if _metric(cell) is not None and cell.utility() is not None]
    shown = [cell for cell in shown if _reads(cell) or cell.ceiling is not None]
    attacks = list(dict.fromkeys(cell.first.attack for cell in shown if _reads(cell)))
    groups = sorted(
        grouped(shown, lambda cell: (_title(cell), _metric(cell))),
        key=lambda group: (not any(cell.ceiling for cell in group), -len(group)),
    )
    parted = [part for group in groups for part in _parted(group)]
    return [_panel(part, attacks=attacks) for part in parted]


def _parted(group: Sequence[Row]) -> list[list[Row]]:
    """Return one panel of a kind of adversary, or one for each round where lines are many."""
    if len(_lines([cell for cell in group if cell.ceiling is not None])) <= _MOST:
        return [list(group)]
    return sorted(grouped(group, _moment), key=lambda part: _moment(part[0]) == "first round")


def _panel(group: Sequence[Row], *, attacks: Sequence[str]) -> Drawing:
    """Draw one kind of adversary."""
    bounded = [cell for cell in group if cell.ceiling is not None]
    lines = _lines(bounded)
    several = len({_moment(cell) for cell in group}) > 1
    style = {_messages(cell): place for place, own in enumerate(lines) for cell in own}
    marks = [_mark(cell, attacks, style, group) for cell in group if _reads(cell)]
    metric, utility = _metric(group[0]) or "", group[0].utility()
    title, aside = _title(group[0])
    if not bounded:
        marks += _guesses(group, metric, shape=len(attacks))
    return panel(
        [_curve(own, place, several=several) for place, own in enumerate(lines)],
        list(dict.fromkeys(marks)),
        title=title,
        aside=aside if several else f"{aside}; {_moment(group[0])}",
        utility=utility[0] if utility else "utility",
        leakage=_UP.get(metric, METRIC_IN_WORDS[metric]),
    )


def _curve(own: Sequence[Row], style: int, *, several: bool) -> Curve:
    """Return one point for each setting of the defence, which attacks of one setting share."""
    points: dict[tuple[float, float], tuple[float, float, float]] = {}
    caps: dict[float, float] = {}
    for cell in sorted(own, key=_size):
        met = _Met.of(cell)
        if met is None:
            continue
        points[met.accuracy, met.ceiling] = met.accuracy, met.ceiling, 2 * met.error
        if met.bound.cap is not None:
            caps[met.accuracy] = met.bound.cap
    first = own[0]
    kinds = [cell.first.defense for cell in own if cell.first.defense != "none"]
    test = "test rows" if _attack(first).get("when") == "inference" else ""
    when = _moment(first) if several else ""
    aside = ", ".join(part for part in (*dict.fromkeys(kinds), test, when) if part)
    label = f"{first.case} ({aside})" if aside else first.case
    return Curve(label=label, style=style, ceilings=list(points.values()), caps=list(caps.items()))


def _mark(
    cell: Row, attacks: Sequence[str], style: Mapping[tuple[object, ...], int], group: Sequence[Row]
) -> Mark:
    """Return one attack, hung from the ceiling of the messages it read where that is known."""
    utility, metric = cell.utility(), _metric(cell) or ""
    twin = next((o for o in group if o.ceiling and _messages(o) == _messages(cell)), None)
    return Mark(
        utility=utility[1].mean if utility else 0.0,
        leakage=cell.measures[metric].mean,
        attack=cell.first.attack,
        shape=attacks.index(cell.first.attack),
        hollow=not cell.is_attack,
        style=style.get(_messages(cell)),
        ceiling=None if twin is None or twin.ceiling is None else twin.ceiling[0],
    )


def _guesses(group: Sequence[Row], metric: str, *, shape: int) -> list[Mark]:
    """Return what needs no message in a panel without ceilings."""
    found = []
    for cell in group:
        utility, free = cell.utility(), cell.baseline(metric)
        if utility is not None and free is not None:
            found.append(
                Mark(
                    utility=utility[1].mean,
                    leakage=free[1],
                    attack=_GUESS,
                    shape=shape,
                    hollow=True,
                )
            )
    return found


def _metric(cell: Row) -> str | None:
    return next((name for name in _SHOWN if name in cell.measures), None)


def _reads(cell: Row) -> bool:
    """Say whether a cell is an adversary's: what reads no message is not."""
    threat = cell.first.threat
    return threat is not None and set(threat.evidence) != {str(Evidence.NOTHING)}


def _title(cell: Row) -> tuple[str, str]:
    """Name the kind of adversary: what reads nothing stands with whom its ceiling is of."""
    threat, bound = cell.first.threat, cell.first.ceiling
    active = threat is not None and threat.active
    seat = "" if threat is None else threat.seat
    if not _reads(cell) and bound is not None:
        seat = bound.seat or seat
    manner = "which rewrites messages" if active else "which follows the protocol"
    return _SEATS.get(seat, f"To the {seat}"), manner


def _lines(bounded: Sequence[Row]) -> list[list[Row]]:
    """Return the cells of each line: one case in one round, swept over one defence.

    Without a defence a case is the end of its only defence's line; of several it has its own.
    """
    found: list[list[Row]] = []
    for case in grouped(bounded, _place):
        kinds = {cell.first.defense for cell in case} - {"none"}
        found += [case] if len(kinds) < 2 else grouped(case, lambda cell: cell.first.defense)  # noqa: PLR2004
    return found


def _place(cell: Row) -> tuple[object, ...]:
    """Return case and round: what the messages of a line have in common."""
    return cell.case, cell.first.protocol, _moment(cell), _attack(cell).get("when")


def _messages(cell: Row) -> tuple[object, ...]:
    """Return what two attacks have in common that read the same messages."""
    defense = json.dumps(cell.first.settings.get("defense"), sort_keys=True)
    return *_place(cell), cell.first.defense, defense


def _moment(cell: Row) -> str:
    """Name the round whose messages were read, the same way however the settings name it."""
    collect = _attack(cell).get("collect", "last")
    if _rounds(cell) is None:
        return _MOMENTS.get(str(collect), f"round {collect}")
    number = _round(cell)
    named = (words for moment, words in _MOMENTS.items() if _round(cell, moment) == number)
    return next(named, f"round {number}")


def _round(cell: Row, collect: str | int | None = None) -> int:
    """Return the number of a round: of the one that was attacked, unless another is named."""
    chosen: Any = collect or _attack(cell).get("collect", "last")
    return round_number(chosen, last=_rounds(cell) or len(_MOMENTS))


def _rounds(cell: Row) -> int | None:
    """Return how many rounds were trained; None where a card of a trace does not say."""
    settings: Any = cell.first.settings
    rounds: int | None = settings.get("protocol", {}).get("rounds")
    return rounds


def _attack(cell: Row) -> dict[str, object]:
    own = cell.first.settings.get("attack")
    return dict(own) if isinstance(own, dict) else {}
