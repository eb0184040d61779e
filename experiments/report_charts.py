"""Which cells a report's scatters show, in which colour and shape, and the legend to them."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.measures import Measure
from experiments.report_cells import METRIC_IN_WORDS, Cell
from experiments.report_figures import GLYPHS, MARKERS, PALETTE, Point, scatter

_SHOWN = ("identification", "abs_pearson", "label_accuracy")


def charts(scored: Sequence[Cell]) -> list[str]:
    """Return leakage against utility, one SVG for each of the two first metrics that cells have.

    Args:
        scored: Cells with scores.

    Returns:
        None at all where no utility was measured.
    """
    drawn = []
    for metric in _SHOWN:
        shown = [cell for cell in scored if metric in cell.measures and cell.utility()]
        if shown:
            points = [_point(cell, metric, scored) for cell in shown]
            utility = shown[0].utility()
            drawn.append(
                scatter(
                    points,
                    utility=utility[0] if utility else "utility",
                    leakage=METRIC_IN_WORDS[metric],
                )
            )
    return drawn[:2]


def legend(scored: Sequence[Cell]) -> list[list[dict[str, str]]]:
    """Return the colour of every attack and the shape of every defence.

    Args:
        scored: The cells that :func:`charts` was given.

    Returns:
        Two lines, of attacks and of defences; entries of ``glyph``, ``color`` (may be empty) and
        ``name``.
    """
    shown = [cell for cell in scored if cell.measures and cell.utility()]
    attacks = [
        {
            "glyph": "●" if attack in {c.first.attack for c in shown if c.is_attack} else "○",
            "color": _color(attack, scored),
            "name": attack,
        }
        for attack in _attacks(shown)
    ]
    defenses = [
        {"glyph": GLYPHS[_marker(name, scored)], "color": "", "name": _defense(name)}
        for name in _defenses(shown)
    ]
    return [attacks, defenses]


def _point(cell: Cell, metric: str, scored: Sequence[Cell]) -> Point:
    measure, utility = cell.measures[metric], cell.utility()
    return Point(
        utility=utility[1].mean if utility else 0.0,
        leakage=measure.mean,
        error=_error(measure),
        color=_color(cell.first.attack, scored),
        marker=_marker(cell.first.defense, scored),
        hollow=not cell.is_attack,
    )


def _error(measure: Measure) -> tuple[float, float]:
    """Return how far a bar reaches below and above: the interval of a rate, else two errors."""
    if measure.interval is not None:
        low, high = measure.interval
        return max(measure.mean - low, 0.0), max(high - measure.mean, 0.0)
    both = 2 * (measure.stderr or 0.0)
    return both, both


def _attacks(scored: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.first.attack for cell in scored))


def _defenses(scored: Sequence[Cell]) -> list[str]:
    return sorted({cell.first.defense for cell in scored}, key=lambda name: (name != "none", name))


def _color(attack: str, scored: Sequence[Cell]) -> str:
    return PALETTE[_attacks(scored).index(attack) % len(PALETTE)]


def _marker(defense: str, scored: Sequence[Cell]) -> str:
    return MARKERS[_defenses(scored).index(defense) % len(MARKERS)]


def _defense(name: str) -> str:
    return "no defence" if name == "none" else name
