"""The figures of a report: images as PNG data URIs, leakage against utility as inline SVG.

The SVG takes its text colour from the page, so that it reads on light and on dark paper, and keeps
its text as text. As files, for a paper, the same figures are SVG and PDF in black ink.

A scatter shows a table's cells. A panel is of one kind of adversary: ceilings as lines, attacks as
marks, told apart by letters, dashes and shapes, so that it reads without colour.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from string import ascii_uppercase
from textwrap import fill
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from experiments.report.rows import METRIC_IN_WORDS, Row
from experiments.report.statistics import Measure
from experiments.results.cards import written_whole

PALETTE = ("#0a84c6", "#e07b00", "#159b74", "#c8508f", "#7a68c4", "#b3872b", "#d0493c", "#6b7b8c")
"""Colours of the attacks, of like lightness: each reads on light and on dark paper."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Shapes of the defences, in matplotlib's letters."""

GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖★", strict=True))
"""The same shapes as text, for a legend outside the figure."""

_Dash: TypeAlias = Literal["-", "--", "-.", ":"]
_DASHES: tuple[_Dash, ...] = ("-", "--", "-.", ":")
_WIDE = 46  # letters of a label that fit below a panel
_INK = "#010203"  # nearly black; stands for the page's own text colour in an inline SVG
_RGB = 3
_UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _style() -> AbstractContextManager[None]:
    """Keep text as text in both formats, and let equal figures give equal files."""
    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "leakbed",
            "pdf.fonttype": 42,
            "font.size": 11,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure, for a page or for files.

    Attributes:
        figure: As matplotlib has it.
        title: What it shows, for who cannot see it.
    """

    figure: Figure
    title: str

    def inline(self) -> str:
        """Return it as an ``<svg>`` element; equal figures give equal text."""
        with _style():
            buffer = StringIO()
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=_UNDATED["svg"])
        return _inlined(buffer.getvalue(), self.title)

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write it as SVG and as PDF, each whole or not at all.

        Args:
            folder: Exists.
            name: Of the files, without their ending.

        Returns:
            Both files.
        """
        files = []
        with _style():
            for form, metadata in _UNDATED.items():
                file = folder / f"{name}.{form}"
                with written_whole(file) as partial:
                    self.figure.savefig(partial, format=form, transparent=True, metadata=metadata)
                files.append(file)
        return files


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
    """One line of ceilings in a panel.

    Attributes:
        label: In the legend.
        style: Number of its letter, colour and dash.
        ceilings: Utility, ceiling and two standard errors of it, in the order of the sweep.
        caps: Utility and what the defence's claim allows, where it claims something.
    """

    label: str
    style: int
    ceilings: Sequence[tuple[float, float, float]]
    caps: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One attack in a panel.

    Attributes:
        utility: What was left of the task.
        leakage: What was recovered.
        attack: Its name, in the legend.
        shape: Number of its shape.
        hollow: Whether it needs no attack.
        style: Of the curve whose messages it read; ``None`` where those have no ceiling.
        ceiling: Of those messages.
    """

    utility: float
    leakage: float
    attack: str
    shape: int
    hollow: bool
    style: int | None = None
    ceiling: float | None = None


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


def scatter(
    points: Sequence[Point], *, utility: str, leakage: str, keys: Sequence[Line2D] = ()
) -> Drawing:
    """Draw leakage against utility.

    Args:
        points: The cells.
        utility: Label of the horizontal axis.
        leakage: Label of the vertical axis, which runs from 0 to 1.
        keys: Of a legend below; by default the page has one for several figures.

    Returns:
        The figure.
    """
    with _style():
        figure = Figure(figsize=(4.6, 3.4 + 0.19 * len(keys)), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            _draw(axes, point)
        axes.set(xlabel=utility, ylabel=leakage, ylim=(-0.04, 1.04))
        axes.set_xlim(*_limits([point.utility for point in points]))
        _calm(axes)
        if keys:
            _below(figure, keys)
    return Drawing(figure=figure, title=f"{leakage} against {utility}")


def panel(
    curves: Sequence[Curve],
    marks: Sequence[Mark],
    *,
    title: str,
    aside: str,
    utility: str,
    leakage: str,
) -> Drawing:
    """Draw leakage against utility with its ceilings, the legend inside.

    Args:
        curves: May be empty.
        marks: May be empty, but not both.
        title: Above.
        aside: Below the title, smaller.
        utility: Label of the horizontal axis.
        leakage: Label of the vertical axis, which runs from 0 to 100%.

    Returns:
        The figure.
    """
    labels = [_named(curve) for curve in curves]
    lines = sum(label.count("\n") + 1 for label in labels) + len({mark.attack for mark in marks})
    with _style():
        figure = Figure(figsize=(4.9, 3.2 + 0.19 * lines), layout="constrained")
        axes = figure.add_subplot()
        for curve, place in zip(curves, _lettered(curves), strict=True):
            _trace(axes, curve, place)
        for mark in marks:
            _mark(axes, mark)
        axes.set(xlabel=utility, ylabel=leakage, ylim=(-0.05, 1.09))
        axes.set_xlim(*_limits(_across(curves, marks)))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(title, color=_INK, fontsize=12, loc="left", fontweight="bold", pad=22)
        axes.annotate(
            aside, (0, 1), (0, 8), "axes fraction", "offset points", color=_INK, fontsize=10
        )
        _calm(axes)
        _legend(figure, curves, marks)
    return Drawing(figure=figure, title=f"{title}, {aside}: {leakage} against {utility}")


def _across(curves: Sequence[Curve], marks: Sequence[Mark]) -> list[float]:
    return [x for curve in curves for x, _, _ in curve.ceilings] + [m.utility for m in marks]


def _look(style: int | None) -> tuple[str, _Dash]:
    """Return the colour and the dash of a curve, or those of what has none."""
    if style is None:
        return _INK, "-"
    dash = _DASHES[(style + style // len(PALETTE)) % len(_DASHES)]  # a colour that returns differs
    return PALETTE[style % len(PALETTE)], dash


def _letter(style: int) -> str:
    """Return what a curve is called in its panel, of which there are fewer than letters."""
    return ascii_uppercase[style % len(ascii_uppercase)]


def _named(curve: Curve) -> str:
    """Return a curve's letter and label, broken where it would leave the panel."""
    return fill(f"{_letter(curve.style)}  {curve.label}", _WIDE, subsequent_indent="    ")


def _lettered(curves: Sequence[Curve]) -> list[int]:
    """Return at which of its points each curve has its letter: the farthest from all others'.

    Curves often meet where nothing is hidden, and letters would cover each other there.
    """
    chosen: list[int] = []
    for own in curves:
        others = [point[:2] for curve in curves if curve is not own for point in curve.ceilings]
        apart = [
            min((abs(x - u) + abs(y - v) for u, v in others), default=1.0)
            for x, y, _ in own.ceilings
        ]
        chosen.append(apart.index(max(apart)))
    return chosen


def _trace(axes: Axes, curve: Curve, place: int) -> None:
    color, dash = _look(curve.style)
    across, up, error = zip(*curve.ceilings, strict=True)
    axes.errorbar(
        across,
        up,
        yerr=error,
        color=color,
        marker="_",
        linestyle=dash,
        markersize=13,
        markeredgewidth=1.8,
        linewidth=1.8,
        elinewidth=1,
    )
    if curve.caps:
        axes.plot(*zip(*curve.caps, strict=True), color=color, linewidth=0.8, alpha=0.6)
    axes.annotate(
        _letter(curve.style),
        (across[place], up[place]),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=color,
        fontsize=11,
        fontweight="bold",
    )


def _mark(axes: Axes, mark: Mark) -> None:
    color, _ = _look(mark.style)
    if mark.ceiling is not None:
        ends = [mark.leakage, mark.ceiling]
        axes.plot([mark.utility] * 2, ends, color=color, linewidth=0.8, linestyle=":", alpha=0.7)
    axes.plot([mark.utility], [mark.leakage], **_shape(mark, color))


def _shape(mark: Mark, color: str) -> dict[str, Any]:
    """Return how a mark is drawn, in the figure and in the legend."""
    return {
        "marker": MARKERS[mark.shape % len(MARKERS)],
        "linestyle": "none",
        "markeredgecolor": color,
        "markerfacecolor": "none" if mark.hollow else color,
        "markersize": 7,
        "markeredgewidth": 1.3,
        "clip_on": False,
    }


def _legend(figure: Figure, curves: Sequence[Curve], marks: Sequence[Mark]) -> None:
    """Put the letters and dashes of curves and the shapes of attacks below a panel."""
    lines = []
    for curve in curves:
        color, dash = _look(curve.style)
        label = _named(curve)
        lines.append(Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=label))
    shapes = {mark.attack: mark for mark in marks}
    points = [
        Line2D([], [], **_shape(mark, _INK), label=f"{name}{' (no attack)' * mark.hollow}")
        for name, mark in shapes.items()
    ]
    _below(figure, [*lines, *points])


def _below(figure: Figure, keys: Sequence[Line2D]) -> None:
    """Put a legend below a figure."""
    figure.legend(
        handles=list(keys),
        loc="outside lower left",
        frameon=False,
        fontsize=10,
        labelcolor=_INK,
        handlelength=3.4,
        labelspacing=0.35,
        borderaxespad=0.2,
    )


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


def charts(scored: Sequence[Row], *, keyed: bool = False) -> list[Drawing]:
    """Draw leakage against utility, once for each of the two first metrics that cells have.

    Args:
        scored: Cells with scores.
        keyed: Whether each figure has its own legend, as a file needs it.

    Returns:
        None at all where no utility was measured.
    """
    drawn = []
    for metric in _SHOWN:
        shown = [cell for cell in scored if metric in cell.measures and cell.utility()]
        if shown:
            among = shown if keyed else scored  # colours repeat after eight attacks
            points = [_point(cell, metric, among) for cell in shown]
            utility = shown[0].utility()
            drawn.append(
                scatter(
                    points,
                    utility=utility[0] if utility else "utility",
                    leakage=METRIC_IN_WORDS[metric],
                    keys=_keys(shown) if keyed else (),
                )
            )
    return drawn[:2]


def _keys(shown: Sequence[Row]) -> list[Line2D]:
    """Return the colour of every attack and the shape of every defence, for a figure's legend."""
    real = {cell.first.attack for cell in shown if cell.is_attack}
    attacks = [
        ("o", _color(name, shown), name in real, name if name in real else f"{name} (no attack)")
        for name in _attacks(shown)
    ]
    defenses = [(_marker(name, shown), _INK, True, _defense(name)) for name in _defenses(shown)]
    return [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markeredgecolor=color,
            markerfacecolor=color if filled else "none",
            label=label,
        )
        for marker, color, filled, label in (*attacks, *defenses)
    ]


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
    """Return how far a bar reaches below and above."""
    low, high = measure.bounds or (measure.mean, measure.mean)
    return max(measure.mean - low, 0.0), max(high - measure.mean, 0.0)


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
