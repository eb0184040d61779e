"""The heat maps of a report: what every attack recovers under every defence, beside what is learnt.

One map for each case that several attacks and several defences share. A field's tint is the skill,
the share of the way from the best guess that needed no message to a perfect one. Of several seeds
the lowest and the highest stand below the mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from experiments.imbalance import BALANCED, leading
from experiments.measures import pooled, value_text
from experiments.report_cells import METRIC_IN_WORDS, Cell, grouped

Words: TypeAlias = Callable[[Cell], tuple[str, dict[str, str]]]

_AUC = "leak_auc"  # a score of rows is judged by its order, not by a threshold
_FEWEST = 2  # attacks and defences: one row or one column is no map
_DARKEST = 80  # percent of the accent colour, over which text is still readable
_NOTHING = "\N{EN DASH}"
_IMBALANCED = (
    "One label is much commoner than the others here, so attacks on labels are shown by their "
    "balanced label accuracy, to which every label counts alike."
)


def matrices(shown: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a map of every case that has two attacks under two defences or more.

    Args:
        shown: Cells with scores, and those whose training diverged.

    Returns:
        Maps as the page wants them: ``title``, a ``note`` or none, ``defenses``, ``rows`` of an
        ``attack``, its ``metric`` and its ``fields``, and the ``utility`` under each defence.
    """
    found = [_matrix(group) for group in grouped(shown, _place)]
    return [each for each in found if each is not None]


def _matrix(group: Sequence[Cell]) -> dict[str, Any] | None:
    columns = sorted(grouped(group, _defense), key=lambda column: _rank(_defense_words(column[0])))
    lines = sorted(grouped(group, _attack), key=lambda line: _rank(_attack_words(line[0])))
    if min(len(columns), len(lines)) < _FEWEST:
        return None
    keys = [_defense(column[0]) for column in columns]
    first = group[0]
    names = dict.fromkeys((first.case, first.first.model, first.first.data))
    metrics = [_metric(line) for line in lines]
    return {
        "title": ", ".join(names),
        "note": _IMBALANCED if BALANCED in metrics else "",
        "defenses": _named([column[0] for column in columns], _defense_words),
        "rows": [
            {"attack": name, **_line(line, keys, metric)}
            for name, line, metric in zip(
                _named([line[0] for line in lines], _attack_words), lines, metrics, strict=True
            )
        ],
        "utility": [_utility(column) for column in columns],
    }


def _metric(line: Sequence[Cell]) -> str | None:
    """Return the metric that leads where most of an attack's cells have it."""
    order = [_AUC, *leading(line)]
    if BALANCED in order:  # in the place of what it corrects, where all of them have it
        order.remove(BALANCED)
        order.insert(order.index("label_accuracy"), BALANCED)
    return max(
        (name for name in order if any(name in cell.measures for cell in line)),
        key=lambda name: sum(name in cell.measures for cell in line),
        default=None,
    )


def _line(line: Sequence[Cell], keys: Sequence[str], metric: str | None) -> dict[str, Any]:
    """Return one attack's fields, all of one metric."""
    by_defense: dict[str, Cell] = {}
    for cell in sorted(line, key=lambda cell: bool(cell.measures)):
        by_defense[_defense(cell)] = cell  # of seeds that ended differently, those with scores
    fields = [_field(by_defense.get(key), metric) for key in keys]
    return {"metric": METRIC_IN_WORDS[metric] if metric else _NOTHING, "fields": fields}


def _field(cell: Cell | None, metric: str | None) -> dict[str, Any]:
    if cell is None or metric is None or metric not in cell.measures:
        lost = cell is not None and cell.first.status == "diverged"
        return _empty() | ({"value": "diverged"} if lost else {})
    value, base = cell.measures[metric].mean, cell.baseline(metric)
    chance = base[1] if base else 0.0
    skill = (value - chance) / (1 - chance) if chance < 1 else 0.0
    said = [f"({value_text(metric, chance)})"] if base else []
    if cell.diverged:
        said.append(f"{cell.diverged} of {cell.diverged + len(cell.cards)} diverged")
    return {
        "value": value_text(metric, value),
        "range": _range(cell, metric),
        "base": " ".join(said),
        "tint": round(_DARKEST * min(max(skill, 0.0), 1.0)),
    }


def _range(cell: Cell, metric: str) -> str:
    """Return the lowest and the highest of several seeds' values; nothing of one seed."""
    found = [pooled([card.scores], metric) for card in cell.cards]
    known = [measure.mean for measure in found if measure is not None]
    if len(known) < _FEWEST:
        return ""
    low, high = (value_text(metric, end) for end in (min(known), max(known)))
    return f"{low.removesuffix('%')}\N{EN DASH}{high}"


def _empty() -> dict[str, Any]:
    return {"value": _NOTHING, "range": "", "base": "", "tint": 0}


def _utility(column: Sequence[Cell]) -> str:
    """Return what the defence left of the task, where nobody changed the training besides."""
    honest = [cell for cell in column if not (cell.first.threat and cell.first.threat.active)]
    found = next((utility for cell in honest if (utility := cell.utility())), None)
    return _NOTHING if found is None else value_text("label_accuracy", found[1].mean)


def _place(cell: Cell) -> tuple[object, ...]:
    card = cell.first
    return cell.case, card.protocol, card.model, card.data, card.cut, card.nodes


def _defense(cell: Cell) -> str:
    return json.dumps([cell.first.defense, cell.first.settings.get("defense")], sort_keys=True)


def _attack(cell: Cell) -> str:
    return json.dumps([cell.first.attack, cell.first.settings.get("attack")], sort_keys=True)


def _table(cell: Cell, name: str) -> dict[str, Any]:
    """Return one table of a cell's settings; empty where a card has none."""
    found: Any = cell.first.settings.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _defense_words(cell: Cell) -> tuple[str, dict[str, str]]:
    stack = _table(cell, "defense").get("stack", ())
    own = {f"{name} {key}": _said(value) for name, given in stack for key, value in given.items()}
    return "no defence" if cell.first.defense == "none" else cell.first.defense, own


def _attack_words(cell: Cell) -> tuple[str, dict[str, str]]:
    settings = _table(cell, "attack")
    common = {key: value for key, value in settings.items() if key not in {"own", "name"}}
    told = {**common, **settings.get("own", {})}
    return cell.first.attack, {key: _said(value) for key, value in told.items()}


def _rank(words: tuple[str, Mapping[str, str]]) -> tuple[object, ...]:
    """Return what orders rows and columns: no defence first, then names, then sizes of settings."""
    name, own = words
    return name != "no defence", name, [_size(value) for value in own.values()]


def _size(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return 0.0, value


def _said(value: object) -> str:
    return json.dumps(value).strip('"')


def _named(members: Sequence[Cell], words: Words) -> list[str]:
    """Return a name for each, with those settings that tell it from its namesakes."""
    told: list[tuple[str, Mapping[str, str]]] = [words(cell) for cell in members]
    names = []
    for name, own in told:
        others = [each for other, each in told if other == name]
        apart = [key for key in own if len({each.get(key) for each in others}) > 1]
        names.append(", ".join([name, *(f"{key.split()[-1]} {own[key]}" for key in apart)]))
    return names
