"""The frontier of a report: accuracy against ceiling as noise is swept, and attacks as marks below.

A curve is one case under one kind of defence. First and last rounds have figures of their own,
since a ceiling of the one says nothing of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report_cells import Cell, grouped
from experiments.report_figures import Curve, frontier

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
