"""The figures of a report: images as PNG data URIs, leakage against utility as inline SVG.

The SVG takes its text colour from the page, so that it reads on light and on dark paper, and keeps
its text as text.

Which cells a report's scatters show, in which colour and shape, and the legend to them.

The frontier of a report: accuracy against ceiling as noise is swept, and attacks as marks below.

A curve is one case under one kind of defence. First and last rounds have figures of their own,
since a ceiling of the one says nothing of the other.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from experiments.report.rows import METRIC_IN_WORDS, Family, Row, grouped
from experiments.report.statistics import Measure

PALETTE = ("#0a84c6", "#e07b00", "#159b74", "#c8508f", "#7a68c4", "#b3872b", "#d0493c", "#6b7b8c")
"""Colours of the attacks, of like lightness: each reads on light and on dark paper."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Shapes of the defences, in matplotlib's letters."""

GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖★", strict=True))
"""The same shapes as text, for a legend outside the figure."""

_DASHES = ("-", "--", "-.", ":")
_INK = "#010203"  # stands for the page's own text colour until the SVG is written
_RGB = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cell in a scatter.

    Attributes:
        utility: What was left of the task.
        leakage: What was recovered.
        error: Two standard errors of ``leakage``, below and above.
        color: Of the attack.
        marker: Of the defence.
        hollow: Whether it needs no attack.
    """

    utility: float
    leakage: float
    error: tuple[float, float]
    color: str
    marker: str
    hollow: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line in a frontier, with the attacks below it.

    Attributes:
        label: In the legend.
        style: Number of its colour, dash and marker, the same in every figure of a report.
        ceilings: Utility, ceiling and two standard errors of it, from point to point.
        caps: Utility and what the defence's claim allows, where it claims something.
        attacks: Utility, leakage, and whether no attack is needed.
    """

    label: str
    style: int
    ceilings: Sequence[tuple[float, float, float]]
    caps: Sequence[tuple[float, float]] = ()
    attacks: Sequence[tuple[float, float, bool]] = ()


def png(image: Float[Tensor, " channels height width"]) -> str:
    """Return an image as a data URI, one pixel per pixel.

    Args:
        image: Intensities in [0, 1]; of other channel counts than 3 the first is shown.

    Returns:
        ``data:image/png;base64,...``.
    """
    pixels = (image.detach().cpu().clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    shown = pixels.transpose(1, 2, 0) if len(pixels) == _RGB else pixels[0]
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scatter(points: Sequence[Point], *, utility: str, leakage: str) -> str:
    """Return leakage against utility as an SVG element.

    Args:
        points: The cells.
        utility: Label of the horizontal axis.
        leakage: Label of the vertical axis, which runs from 0 to 1.

    Returns:
        One ``<svg>``; equal points give equal text.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "leakbed", "font.size": 11}):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            _draw(axes, point)
        axes.set(xlabel=utility, ylabel=leakage, ylim=(-0.04, 1.04))
        axes.set_xlim(*_limits([point.utility for point in points]))
        _calm(axes)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(buffer.getvalue(), f"{leakage} against {utility}")


def frontier(curves: Sequence[Curve], *, title: str, utility: str) -> str:
    """Return ceilings against utility as an SVG element, with its legend inside.

    Lines differ in colour, in dash and in marker, so that they are told apart in print as well.

    Args:
        curves: At least one.
        title: Above.
        utility: Label of the horizontal axis.

    Returns:
        One ``<svg>``; equal curves give equal text.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "leakbed", "font.size": 11}):
        figure = Figure(figsize=(4.9, 3.6 + 0.21 * len(curves)), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _trace(axes, curve)
        axes.set(xlabel=utility, ylabel="rows named by the best guess", ylim=(-0.04, 1.04))
        axes.set_xlim(*_limits([x for curve in curves for x, _, _ in curve.ceilings]))
        axes.set_title(title, color=_INK, fontsize=11, loc="left")
        _calm(axes)
        figure.legend(
            loc="outside lower left", frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=4.5
        )
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(buffer.getvalue(), f"{title}: ceiling against {utility}")


def _trace(axes: Axes, curve: Curve) -> None:
    place = curve.style
    dash = _DASHES[(place + place // len(PALETTE)) % len(_DASHES)]  # a colour that returns differs
    color, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
    across, up, error = zip(*sorted(curve.ceilings), strict=True)
    axes.errorbar(
        across,
        up,
        yerr=error,
        color=color,
        marker=marker,
        linestyle=dash,
        markersize=6,
        linewidth=1.8,
        elinewidth=1,
        label=curve.label,
    )
    if curve.caps:
        axes.plot(*zip(*sorted(curve.caps), strict=True), color=color, linewidth=0.8, alpha=0.6)
    for x, y, hollow in curve.attacks:
        face = "none" if hollow else color
        axes.plot([x], [y], marker=marker, color=color, markerfacecolor=face, markersize=4)


def _draw(axes: Axes, point: Point) -> None:
    axes.errorbar(
        [point.utility],
        [point.leakage],
        yerr=[[point.error[0]], [point.error[1]]],
        fmt=point.marker,
        color=point.color,
        markersize=8,
        markerfacecolor="none" if point.hollow else point.color,
        markeredgewidth=1.6,
        elinewidth=1,
        alpha=0.9,
    )


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Return an axis that shows every value and at least a twentieth of the whole scale."""
    known = list(values) or [0.5]
    middle = (max(known) + min(known)) / 2
    reach = max((max(known) - min(known)) / 2 * 1.2, 0.025)
    return middle - reach, middle + reach


def _calm(axes: Axes) -> None:
    """Keep two thin axes and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=3)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
        axes.spines[side].set_alpha(0.5)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)


def _inlined(text: str, title: str) -> str:
    """Return a written SVG as an element for a page: no prolog, fluid, in the page's colours."""
    element = text[text.index("<svg ") :]
    element = element.replace(_INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", element)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    opening = re.compile(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', re.DOTALL)
    return opening.sub(
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox="\1" role="img" aria-label="{label}">',
        element,
        count=1,
    )


_SHOWN = ("identification", "abs_pearson", "label_accuracy", "attribute_accuracy")


def charts(scored: Sequence[Row]) -> list[str]:
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


def legend(scored: Sequence[Row]) -> list[list[dict[str, str]]]:
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


def _point(cell: Row, metric: str, scored: Sequence[Row]) -> Point:
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


def _attacks(scored: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(cell.first.attack for cell in scored))


def _defenses(scored: Sequence[Row]) -> list[str]:
    return sorted({cell.first.defense for cell in scored}, key=lambda name: (name != "none", name))


def _color(attack: str, scored: Sequence[Row]) -> str:
    return PALETTE[_attacks(scored).index(attack) % len(PALETTE)]


def _marker(defense: str, scored: Sequence[Row]) -> str:
    return MARKERS[_defenses(scored).index(defense) % len(MARKERS)]


def _defense(name: str) -> str:
    return "no defence" if name == "none" else name


_NEAR = 0.015  # to either side, so that any two accuracies are within three points
_MOMENTS = {"first": "First round", "middle": "Middle round", "last": "Last round"}


def frontiers(scored: Sequence[Row]) -> list[str]:
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


def at_equal_accuracy(scored: Sequence[Row]) -> list[str]:
    """Say who gives away more where both families of protocols learn the same, and to whom.

    Of each family the lowest ceiling counts, of the last round's messages, of all that learn the
    most that both reach, within three points of each other.

    Args:
        scored: Cells with scores.

    Returns:
        Two sentences; none where the families do not meet.
    """
    known: dict[Family, list[tuple[float, float, Row]]] = {"weights": [], "split": []}
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


def _chance(cell: Row) -> str:
    bound = cell.first.ceiling
    return _percent((bound.chance if bound else None) or 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.1 else f"{100 * share:.0f}%"  # noqa: PLR2004


def _moment(cell: Row) -> str:
    collect = _attack(cell).get("collect")
    return _MOMENTS.get(str(collect), f"Round {collect}")


def _name(cell: Row) -> str:
    """Return what a curve is called in every round: its case and its defence."""
    return cell.case if cell.first.defense == "none" else f"{cell.case}, {cell.first.defense}"


def _label(cell: Row) -> str:
    """Return what a curve is called in one round: test rows are named as such."""
    test = " (test rows)" if _attack(cell).get("when") == "inference" else ""
    return f"{_name(cell)}{test}"


def _attack(cell: Row) -> dict[str, object]:
    own = cell.first.settings.get("attack")
    return dict(own) if isinstance(own, dict) else {}


def _curve(group: Sequence[Row], style: int) -> Curve:
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
