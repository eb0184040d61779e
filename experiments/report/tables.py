"""The tables of a report: every score beside what needs no evidence, what it cost and who said so.

Cells of one network and data set share a table; entries of the catalogue that only say what a score
is worth without an attack are rows like any other, in softer ink.

There is a heat map for each case that several attacks and several defences share: what every attack
recovers under every defence, beside what is learnt. A field's tint is the skill, the share of the
way from the best guess that needed no message to a perfect one. Of several seeds the lowest and the
highest stand below the mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import JsonValue

from experiments.report.caveats import doubts, published
from experiments.report.rows import BALANCED, METRIC_IN_WORDS, Row, grouped, leading
from experiments.report.statistics import Measure, error_text, number, pooled, text, value_text

_NOTHING = "\N{EN DASH}"
_KIBI = 1024
_MINUTE = 60


def setting(cell: Row) -> str:
    """Return everything but the attack that tells a cell from others, as one line."""
    card = cell.first
    parts = [
        cell.case if card.protocol in cell.case else f"{cell.case} ({card.protocol})",
        "" if cell.cut is None or "cut=" in cell.case else f"cut {cell.cut}",
        "no defence" if card.defense == "none" else card.defense,
        cell.variant,
        _seeds(cell),
    ]
    return ", ".join(part for part in parts if part)


def _seeds(cell: Row) -> str:
    """Return how many seeds a row's means are of, where that is not plainly one."""
    diverged = cell.diverged if cell.first.status == "done" else 0
    count = len(cell.cards)
    seeds = f"{count} seeds" if count > 1 else "1 seed" if diverged else ""
    return f"{seeds} of {count + diverged}, the others diverged" if diverged else seeds


def tables(scored: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one table for each network and data set.

    Args:
        scored: Cells with scores.

    Returns:
        Tables as the page wants them: title, metrics and rows.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in scored:
        groups.setdefault((cell.first.model, cell.first.data), []).append(cell)
    return [_table(names, group) for names, group in groups.items()]


def stolen(scored: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what stolen models do under the server's top, one row per cell that stole one."""
    rows = []
    for cell in scored:
        found = cell.first.scores.get("stolen_model")
        if not isinstance(found, dict):
            continue
        names = (
            "accuracy",
            "untrained_accuracy",
            "victim_accuracy",
            "agreement",
            "untrained_agreement",
        )
        rows.append(
            {
                "attack": cell.first.attack,
                "setting": setting(cell),
                "metrics": [_share(found.get(name)) for name in names],
            }
        )
    return rows


def _table(names: tuple[str, str], group: Sequence[Row]) -> dict[str, Any]:
    own = list(dict.fromkeys(name for cell in group for name in cell.own_metrics))
    shown = [name for name in leading(group) if any(name in cell.measures for cell in group)]
    metrics = [*shown, *own]
    listed = [name for name in METRIC_IN_WORDS if any(name in cell.measures for cell in group)]
    every = [*listed, *own]
    return {
        "title": f"{names[0]} on {names[1]}",
        "metrics": [METRIC_IN_WORDS.get(name, name) for name in metrics],
        "all_metrics": [METRIC_IN_WORDS.get(name, name) for name in every],
        "reported": any(cell.first.reported is not None for cell in group),
        "rows": [_row(cell, metrics) for cell in group],
        "everything": [row for cell in group for row in _everything(cell, every)],
    }


def _row(cell: Row, metrics: Sequence[str]) -> dict[str, Any]:
    said = doubts(cell)
    if cell.failures:
        said.append(f"{cell.failures} of {cell.targets} targets failed and count as failures")
    said += cell.budget_bound
    utility = cell.utility()
    return {
        "kind": " ".join(
            ["" if cell.is_attack else "plain", "doubted" if said else ""],
        ).strip(),
        "attack": cell.first.attack,
        "setting": setting(cell),
        "facts": facts(cell),
        "metrics": [_score(cell, metric) for metric in metrics],
        "control": _control(cell),
        "utility": {
            "value": value_text("label_accuracy", utility[1].mean) if utility else _NOTHING,
            "name": utility[0] if utility else "",
        },
        "cost": _cost(cell),
        "reported": _reported(cell),
        "doubts": "; ".join(said),
    }


def facts(cell: Row) -> str:
    """Return what decides a cell's numbers beside its settings, as one line.

    Args:
        cell: Of one or several seeds, of which the first says when its messages were made.

    Returns:
        When and from how many rows the messages were made, what the settings were chosen on, how
        much of the guesses was clipped, and the cards' notes.
    """
    card = cell.first
    shares = [number(each.scores.get("clipped")) for each in cell.cards]
    known = [share for share in shares if share is not None]
    clipped = sum(known) / len(known) if known else 0.0
    parts = [
        card.exposure.in_words() if card.exposure is not None else "",
        _tuned(card.tuned_on),
        f"{100 * clipped:.2g}% of the guesses' pixels clipped" if clipped else "",
        *dict.fromkeys(note for each in cell.cards for note in each.notes),
    ]
    return "; ".join(part for part in parts if part)


def _tuned(told: JsonValue) -> str:
    """Say what an attack's settings were chosen on."""
    if not isinstance(told, dict):
        return "settings as published" if told == "published" else "default settings"
    seeds = told.get("seeds")
    listed = ", ".join(map(str, seeds)) if isinstance(seeds, list) else ""
    many = "seeds" if isinstance(seeds, list) and len(seeds) > 1 else "seed"
    rows = told.get("rows")
    part = "images outside these data" if rows == "elsewhere" else f"the {rows} rows"
    return f"settings chosen on {part}" + (f", {many} {listed}" if listed else "")


def _score(cell: Row, metric: str) -> dict[str, Any]:
    """Return a score with its error, its skill where that is a leading one, and its baseline."""
    measure = cell.measures.get(metric)
    if measure is None:
        return {"label": METRIC_IN_WORDS.get(metric, metric), "value": _NOTHING, "notes": []}
    skill = cell.measures.get(f"{metric}_skill") if metric == "ssim" else None
    best = cell.baseline(metric)
    notes = [
        error_text(metric, measure),
        f"skill {value_text('ssim_skill', skill.mean)}" if skill is not None else "",
        f"{best[0]} {value_text(metric, best[1])}" if best else "",
        _judge(cell) if metric == "class_rate" else "",
        _ceiling(cell) if metric == "identification" else "",
        _canaries(cell) if metric == "label_accuracy" else "",
    ]
    return {
        "label": METRIC_IN_WORDS.get(metric, metric),
        "value": value_text(metric, measure.mean),
        "notes": [note for note in notes if note],
    }


def _ceiling(cell: Row) -> str:
    """Return what no attack from the seat exceeds, but by chance."""
    if cell.ceiling is not None:
        value, error = cell.ceiling
        measure = Measure(mean=value, stderr=error)
        return f"ceiling {text('identification', measure)}"
    return "no ceiling" if any(card.ceiling is not None for card in cell.cards) else ""


def _canaries(cell: Row) -> str:
    """Return how many canaries' labels were named, and how many at most could be but by chance."""
    if (found := cell.ceiling_of("canary label")) is None:
        return ""
    bounds = [card.ceiling for card in cell.cards if card.ceiling]
    hits, of = sum(each.hits or 0 for each in bounds), sum(each.targets or 0 for each in bounds)
    ceiling = text("label_accuracy", Measure(mean=found[0], stderr=found[1]))
    return f"canaries {hits} of {of}, ceiling {ceiling}"


def _judge(cell: Row) -> str:
    """Return what the classifier behind a class rate is worth on held-out images."""
    judge = cell.first.scores.get("judge")
    return f"judge right {_share(judge.get('accuracy'))}" if isinstance(judge, dict) else ""


def _control(cell: Row) -> dict[str, str]:
    within = cell.control_within
    if within is None:
        return {"kind": "yes", "text": "none"}
    return {"kind": "yes", "text": "holds"} if within else {"kind": "no", "text": "fails"}


def _cost(cell: Row) -> dict[str, Any]:
    """Return the attack's time, and the time and traffic of the run it attacked."""
    attack, training = cell.cost("attack_seconds"), cell.cost("seconds")
    traffic = [cell.cost(name) for name in ("bytes_up", "bytes_down")]
    own = attack if attack is not None else training
    notes = [
        f"after {_duration(training)}" if training is not None and attack is not None else "",
        *(
            f"{_size(value)} {way}"
            for value, way in zip(traffic, ("up", "down"), strict=True)
            if value is not None
        ),
    ]
    return {
        "time": _NOTHING if own is None else _duration(own),
        "notes": [note for note in notes if note],
    }


def _reported(cell: Row) -> str:
    """Return the source's own figure, named where it is a table of metrics."""
    figures = published(cell.first)
    if figures:
        return ", ".join(
            f"{METRIC_IN_WORDS.get(name, name)} {value_text(name, value)}"
            for name, value in figures.items()
        )
    reported = cell.first.reported
    if reported is None:
        return _NOTHING
    return reported if isinstance(reported, str) else json.dumps(reported)


def _everything(cell: Row, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return a cell's row of every metric, and one for each of its baselines."""
    memory = cell.cost("peak_memory")
    own = {
        "kind": "",
        "name": cell.first.attack,
        "setting": setting(cell),
        "metrics": [_text(metric, cell.measures.get(metric)) for metric in metrics],
        "memory": _NOTHING if memory is None else _size(memory),
    }
    names = list(dict.fromkeys(name for card in cell.cards for name in card.baselines))
    values = {metric: cell.baselines(metric) for metric in metrics}
    return [
        own,
        *(
            {
                "kind": "plain",
                "name": name,
                "setting": "",
                "metrics": [
                    value_text(metric, values[metric][name]) if name in values[metric] else _NOTHING
                    for metric in metrics
                ],
                "memory": "",
            }
            for name in names
        ),
    ]


def _text(metric: str, measure: Measure | None) -> str:
    return _NOTHING if measure is None else text(metric, measure)


def _share(entry: object) -> str:
    """Return a share in percent, from a number or a summary."""
    value = number(entry.get("mean")) if isinstance(entry, dict) else number(entry)
    return _NOTHING if value is None else value_text("label_accuracy", value)


def _duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    return f"{seconds / _MINUTE:.1f} min"


def _size(count: float) -> str:
    """Return bytes in a unit that leaves up to four digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < _KIBI:
            return f"{count:.0f} {unit}"
        count /= _KIBI
    return f"{count:.1f} GiB"


Words: TypeAlias = Callable[[Row], tuple[str, dict[str, str]]]

_AUC = "leak_auc"  # a score of rows is judged by its order, not by a threshold
_FEWEST = 2  # attacks and defences: one row or one column is no map
_DARKEST = 80  # percent of the accent colour, over which text is still readable
_NO_CELL = "\N{EN DASH}"
_IMBALANCED = (
    "One label is much commoner than the others here, so attacks on labels are shown by their "
    "balanced label accuracy, to which every label counts alike."
)


def matrices(shown: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a map of every case that has two attacks under two defences or more.

    Args:
        shown: Cells with scores, and those whose training diverged.

    Returns:
        Maps as the page wants them: ``title``, a ``note`` or none, ``defenses``, ``rows`` of an
        ``attack``, its ``metric`` and its ``fields``, and the ``utility`` under each defence.
    """
    found = [_matrix(group) for group in grouped(shown, _place)]
    return [each for each in found if each is not None]


def _matrix(group: Sequence[Row]) -> dict[str, Any] | None:
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


def _metric(line: Sequence[Row]) -> str | None:
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


def _line(line: Sequence[Row], keys: Sequence[str], metric: str | None) -> dict[str, Any]:
    """Return one attack's fields, all of one metric."""
    by_defense: dict[str, Row] = {}
    for cell in sorted(line, key=lambda cell: bool(cell.measures)):
        by_defense[_defense(cell)] = cell  # of seeds that ended differently, those with scores
    fields = [_field(by_defense.get(key), metric) for key in keys]
    return {"metric": METRIC_IN_WORDS[metric] if metric else _NO_CELL, "fields": fields}


def _field(cell: Row | None, metric: str | None) -> dict[str, Any]:
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


def _range(cell: Row, metric: str) -> str:
    """Return the lowest and the highest of several seeds' values; nothing of one, or all alike."""
    found = [pooled([card.scores], metric) for card in cell.cards]
    known = [measure.mean for measure in found if measure is not None]
    if len(known) < _FEWEST:
        return ""
    low, high = (value_text(metric, end) for end in (min(known), max(known)))
    return "" if low == high else f"{low.removesuffix('%')}\N{EN DASH}{high}"


def _empty() -> dict[str, Any]:
    return {"value": _NO_CELL, "range": "", "base": "", "tint": 0}


def _utility(column: Sequence[Row]) -> str:
    """Return what the defence left of the task, where nobody changed the training besides."""
    honest = [cell for cell in column if not (cell.first.threat and cell.first.threat.active)]
    found = next((utility for cell in honest if (utility := cell.utility())), None)
    return _NO_CELL if found is None else value_text("label_accuracy", found[1].mean)


def _place(cell: Row) -> tuple[object, ...]:
    card = cell.first
    return cell.case, card.protocol, card.model, card.data, card.cut, card.nodes


def _defense(cell: Row) -> str:
    return json.dumps([cell.first.defense, cell.first.settings.get("defense")], sort_keys=True)


def _attack(cell: Row) -> str:
    return json.dumps([cell.first.attack, cell.first.settings.get("attack")], sort_keys=True)


def _heat_map(cell: Row, name: str) -> dict[str, Any]:
    """Return one table of a cell's settings; empty where a card has none."""
    found: Any = cell.first.settings.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _defense_words(cell: Row) -> tuple[str, dict[str, str]]:
    stack = _heat_map(cell, "defense").get("stack", ())
    own = {f"{name} {key}": _said(value) for name, given in stack for key, value in given.items()}
    return "no defence" if cell.first.defense == "none" else cell.first.defense, own


def _attack_words(cell: Row) -> tuple[str, dict[str, str]]:
    settings = _heat_map(cell, "attack")
    common = {key: value for key, value in settings.items() if key not in {"own", "name"}}
    told = {**common, **settings.get("own", {})}
    return cell.first.attack, {key: _said(value) for key, value in told.items()}


def _rank(words: tuple[str, Mapping[str, str]]) -> tuple[object, ...]:
    """Return what orders rows and columns: no defence first, then names, then sizes of settings."""
    name, own = words
    return name != "no defence", name, [_matrix_size(value) for value in own.values()]


def _matrix_size(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return 0.0, value


def _said(value: object) -> str:
    return json.dumps(value).strip('"')


def _named(members: Sequence[Row], words: Words) -> list[str]:
    """Return a name for each, with those settings that tell it from its namesakes."""
    told: list[tuple[str, Mapping[str, str]]] = [words(cell) for cell in members]
    names = []
    for name, own in told:
        others = [each for other, each in told if other == name]
        apart = [key for key in own if len({each.get(key) for each in others}) > 1]
        names.append(", ".join([name, *(f"{key.split()[-1]} {own[key]}" for key in apart)]))
    return names
