"""The tables of a report: every score beside what needs no evidence, what it cost and who said so.

Cells of one network and data set share a table; entries of the catalogue that only say what a
score is worth without an attack are rows like any other, in softer ink.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from experiments.measures import Measure, error_text, number, text, value_text
from experiments.report_cells import LEADING, METRIC_IN_WORDS, Cell
from experiments.verdicts import doubts, published

_NOTHING = "\N{EN DASH}"
_KIBI = 1024
_MINUTE = 60


def setting(cell: Cell) -> str:
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


def _seeds(cell: Cell) -> str:
    """Return how many seeds a row's means are of, where that is not plainly one."""
    diverged = cell.diverged if cell.first.status == "done" else 0
    count = len(cell.cards)
    seeds = f"{count} seeds" if count > 1 else "1 seed" if diverged else ""
    return f"{seeds} of {count + diverged}, the others diverged" if diverged else seeds


def tables(scored: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one table for each network and data set.

    Args:
        scored: Cells with scores.

    Returns:
        Tables as the page wants them: title, metrics and rows.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in scored:
        groups.setdefault((cell.first.model, cell.first.data), []).append(cell)
    return [_table(names, group) for names, group in groups.items()]


def stolen(scored: Sequence[Cell]) -> list[dict[str, Any]]:
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


def _table(names: tuple[str, str], group: Sequence[Cell]) -> dict[str, Any]:
    metrics = [name for name in LEADING if any(name in cell.measures for cell in group)]
    every = [name for name in METRIC_IN_WORDS if any(name in cell.measures for cell in group)]
    return {
        "title": f"{names[0]} on {names[1]}",
        "metrics": [METRIC_IN_WORDS[name] for name in metrics],
        "all_metrics": [METRIC_IN_WORDS[name] for name in every],
        "reported": any(cell.first.reported is not None for cell in group),
        "rows": [_row(cell, metrics) for cell in group],
        "everything": [row for cell in group for row in _everything(cell, every)],
    }


def _row(cell: Cell, metrics: Sequence[str]) -> dict[str, Any]:
    said = doubts(cell)
    if cell.failures:
        said.append(f"{cell.failures} of {cell.targets} targets failed and count as failures")
    utility = cell.utility()
    return {
        "kind": " ".join(
            ["" if cell.is_attack else "plain", "doubted" if said else ""],
        ).strip(),
        "attack": cell.first.attack,
        "setting": setting(cell),
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


def _score(cell: Cell, metric: str) -> dict[str, Any]:
    """Return a score with its error, its skill where that is a leading one, and its baseline."""
    measure = cell.measures.get(metric)
    if measure is None:
        return {"label": METRIC_IN_WORDS[metric], "value": _NOTHING, "notes": []}
    skill = cell.measures.get(f"{metric}_skill") if metric == "ssim" else None
    best = cell.baseline(metric)
    notes = [
        error_text(metric, measure),
        f"skill {value_text('ssim_skill', skill.mean)}" if skill is not None else "",
        f"{best[0]} {value_text(metric, best[1])}" if best else "",
        _judge(cell) if metric == "class_rate" else "",
    ]
    return {
        "label": METRIC_IN_WORDS[metric],
        "value": value_text(metric, measure.mean),
        "notes": [note for note in notes if note],
    }


def _judge(cell: Cell) -> str:
    """Return what the classifier behind a class rate is worth on held-out images."""
    judge = cell.first.scores.get("judge")
    return f"judge right {_share(judge.get('accuracy'))}" if isinstance(judge, dict) else ""


def _control(cell: Cell) -> dict[str, str]:
    within = cell.control_within
    if within is None:
        return {"kind": "yes", "text": "none"}
    return {"kind": "yes", "text": "holds"} if within else {"kind": "no", "text": "fails"}


def _cost(cell: Cell) -> dict[str, Any]:
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


def _reported(cell: Cell) -> str:
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


def _everything(cell: Cell, metrics: Sequence[str]) -> list[dict[str, Any]]:
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
