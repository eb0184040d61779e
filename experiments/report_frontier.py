"""The frontier of a report: accuracy against ceiling as noise is swept, and attacks as marks below.

A curve is one case under one kind of defence. First and last rounds have figures of their own,
since a ceiling of the one says nothing of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report_cells import Cell, Family, grouped
from experiments.report_figures import Curve, frontier

_NEAR = 0.015  # to either side, so that any two accuracies are within three points
_MOMENTS = {"first": "First round", "middle": "Middle round", "last": "Last round"}


def frontiers(scored: Sequence[Cell]) -> list[str]:
    """Return one SVG for each round whose messages were attacked, last ones first.

    Args:
        scored: Cells with scores.

    Returns:
        None at all where no cell has both a ceiling and a utility.
    """
    shown = [cell for cell in scored if cell.ceiling is not None and cell.utility() is not None]
    names = list(dict.fromkeys(_name(cell) for cell in shown))
    moments = sorted(grouped(shown, _moment), key=lambda group: _moment(group[0]) == "First round")
    drawn = []
    for moment in moments:
        utility = moment[0].utility()
        drawn.append(
            frontier(
                [_curve(group, names.index(_name(group[0]))) for group in grouped(moment, _label)],
                title=_moment(moment[0]),
                utility=utility[0] if utility else "utility",
            )
        )
    return drawn


def at_equal_accuracy(scored: Sequence[Cell]) -> list[str]:
    """Say who gives away more where both families of protocols learn the same, and to whom.

    Of each family the lowest ceiling counts, of the last round's messages, of all that learn the
    most that both reach, within three points of each other.

    Args:
        scored: Cells with scores.

    Returns:
        Two sentences; none where the families do not meet.
    """
    known: dict[Family, list[tuple[float, float, Cell]]] = {"weights": [], "split": []}
    for cell in scored:
        utility, bound = cell.utility(), cell.ceiling
        if utility is not None and bound is not None and _moment(cell) == _MOMENTS["last"]:
            known[cell.family].append((bound[0], utility[1].mean, cell))
    if not all(known.values()):
        return []
    most = min(max(learnt for _, learnt, _ in own) for own in known.values())
    least = []
    for own in known.values():
        near = [each for each in own if abs(each[1] - most) <= _NEAR + 1e-9]
        if not near:
            return []
        least.append(min(near, key=lambda each: each[:2]))
    (updates, one, of_update), (rows, other, of_row) = least
    seat, chances = of_row.first.ceiling, [_chance(of_row), _chance(of_update)]
    return [
        f"At {_percent(other)} accuracy the best possible guess names the row behind a message at "
        f"the cut {_percent(rows)} of the time ({_label(of_row)}); at {_percent(one)} accuracy a "
        f"row behind an update {_percent(updates)} of the time ({_label(of_update)}). These are "
        "the lowest of each family at that accuracy, of the last round.",
        f"Both are told to the {seat.seat if seat else 'server'}. Without a message {chances[0]} "
        f"and {chances[1]} of the rows would be named; all the rest is given away.",
    ]


def _chance(cell: Cell) -> str:
    bound = cell.first.ceiling
    return _percent((bound.chance if bound else None) or 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.1 else f"{100 * share:.0f}%"  # noqa: PLR2004


def _moment(cell: Cell) -> str:
    collect = _attack(cell).get("collect")
    return _MOMENTS.get(str(collect), f"Round {collect}")


def _name(cell: Cell) -> str:
    """Return what a curve is called in every round: its case and its defence."""
    return cell.case if cell.first.defense == "none" else f"{cell.case}, {cell.first.defense}"


def _label(cell: Cell) -> str:
    """Return what a curve is called in one round: test rows are named as such."""
    test = " (test rows)" if _attack(cell).get("when") == "inference" else ""
    return f"{_name(cell)}{test}"


def _attack(cell: Cell) -> dict[str, object]:
    own = cell.first.settings.get("attack")
    return dict(own) if isinstance(own, dict) else {}


def _curve(group: Sequence[Cell], style: int) -> Curve:
    """Return one point for each setting of the defence; attacks of one setting share it."""
    points: dict[tuple[float, float], tuple[float, float, float]] = {}
    caps: dict[float, float] = {}
    marks = []
    for cell in group:
        utility, bound = cell.utility(), cell.ceiling
        if utility is None or bound is None:
            continue
        across = utility[1].mean
        points[across, bound[0]] = across, bound[0], 2 * bound[1]
        cap = cell.first.ceiling.cap if cell.first.ceiling is not None else None
        if cap is not None:
            caps[across] = cap
        marks.append((across, cell.measures["identification"].mean, not cell.is_attack))
    return Curve(
        label=_label(group[0]),
        style=style,
        ceilings=list(points.values()),
        caps=sorted(caps.items()),
        attacks=marks,
    )
