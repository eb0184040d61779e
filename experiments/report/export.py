"""A folder's last run for a paper: records for a data frame, a LaTeX table, figures as files.

A record is one row of the report: settings with their seeds pooled, or on request one seed. Numbers
and intervals are those of the report. Settings in which the records differ are columns, under their
dotted keys of a settings file; what a record does not have is ``None``.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from experiments.report.caveats import doubts
from experiments.report.rows import (
    METRIC_IN_WORDS,
    Row,
    cells,
    flat_settings,
    leading,
    read_last_run,
)
from experiments.report.statistics import Measure, number, pooled, text, value_text
from experiments.report.tables import setting
from experiments.results.cards import Card
from leakbed.lookup import unknown_name

Record = dict[str, Any]

_NAMED = frozenset(
    {"data.name", "data.nodes", "model.name", "model.cut", "protocol.name", "attack.name"}
)
"""Settings that a card has as fields of its own."""
COSTS = ("seconds", "attack_seconds", "bytes_up", "bytes_down", "peak_memory", "peak_gpu_memory")
"""Costs of a card that are columns."""


class ExportError(ValueError):
    """What was asked of results that do not have it; says what there is."""


def records(folder: Path, *, by_seed: bool = False) -> list[Record]:
    """Return the results of a folder's last run.

    A folder without results is a :class:`~experiments.results.folder.ReportError`, one of another
    version's cards a :class:`~experiments.results.cards.CardError`.

    Args:
        folder: The results folder.
        by_seed: Whether each seed has a record of its own.

    Returns:
        Records of equal columns, in the order of the report. A score has ``<metric>``,
        ``<metric>_low`` and ``<metric>_high`` (of a rate the exact 95 % interval, else two standard
        errors to either side), and the best guess without a message as ``<metric>_baseline`` with
        its ``<metric>_baseline_name``. Of rows the ceiling is ``ceiling``, of canaries' labels
        ``canary_label_ceiling``.
    """
    rows = cells(read_last_run(Path(folder)).cards)
    if by_seed:
        rows = [Row(cards=(card,)) for row in rows for card in row.cards]
    told = [settings_of(row) for row in rows]
    keys = dict.fromkeys(key for each in told for key in each)
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in told}) > 1]
    metrics = dict.fromkeys([*METRIC_IN_WORDS, *(own for row in rows for own in row.own_metrics)])
    made = [
        [
            names_of(row),
            _seeds(row, by_seed=by_seed),
            {key: each.get(key) for key in differing},
            _counts(row),
            *(_score(row, metric) for metric in metrics),
            _ceilings(row),
            _utility(row),
            {name: row.cost(name) for name in COSTS if row.cost(name) is not None},
            _verdict(row),
        ]
        for row, each in zip(rows, told, strict=True)
    ]
    columns = dict.fromkeys(
        key for group in zip(*made, strict=True) for part in group for key in part
    )
    flat = [{key: value for part in parts for key, value in part.items()} for parts in made]
    return [{column: record.get(column) for column in columns} for record in flat]


def names_of(row: Row) -> Record:
    """Return what a reader tells results apart by, as columns."""
    card = row.first
    return {
        "case": row.case,
        "protocol": card.protocol,
        "data": card.data,
        "model": card.model,
        "cut": card.cut,
        "nodes": card.nodes,
        "attack": card.attack,
        "defense": card.defense,
    }


def settings_of(row: Row) -> Record:
    """Return the other settings of a row by dotted key, a defence's under the defence's name."""
    found = {}
    for key, value in flat_settings(row.first.settings).items():
        short = key.replace(".own.", ".").replace("defense.stack.", "defense.")
        if short not in _NAMED:
            read = json.loads(value)
            found[short] = tuple(read) if isinstance(read, list) else read
    return found


def _seeds(row: Row, *, by_seed: bool) -> Record:
    """Return of how many seeds a row is, or of which; of a trace also the attack's."""
    card = row.first
    if not by_seed:
        return {"seeds": len(row.cards)}
    attack = {} if card.attack_seed is None else {"attack_seed": card.attack_seed}
    return {"seed": card.seed, **attack}


def _counts(row: Row) -> Record:
    """Return what became of a row: targets and failures of all seeds, rows of one message."""
    card = row.first
    scored = bool(card.scores)
    return {
        "status": card.status,
        "why": card.why,
        "demo": card.demo,
        "targets": row.targets if scored else None,
        "rows": number(card.scores.get("rows")),
        "candidates": number(card.scores.get("candidates")),
        "failures": row.failures if scored else None,
    }


def _score(row: Row, metric: str) -> Record:
    """Return one score's columns; none where a row does not have it."""
    if (measure := row.measures.get(metric)) is None:
        return {}
    found = _measured(metric, measure)
    if (best := row.baseline(metric)) is not None:
        found |= {f"{metric}_baseline": best[1], f"{metric}_baseline_name": best[0]}
    return found


def _ceilings(row: Row) -> Record:
    """Return the ceilings of a row's games, each under a name of its own."""
    found: Record = {}
    for name, game in (("ceiling", "row"), ("canary_label_ceiling", "canary label")):
        if (ceiling := row.ceiling_of(game)) is not None:
            found |= _measured(name, Measure(mean=ceiling[0], stderr=ceiling[1]))
    return found


def _utility(row: Row) -> Record:
    tables = [card.utility for card in row.cards]
    found: Record = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        if (left := pooled(tables, name)) is not None:
            found |= _measured(name, left)
    return found


def _verdict(row: Row) -> Record:
    within = row.control_within
    return {
        "control": None if within is None else "holds" if within else "fails",
        "doubts": "; ".join([*doubts(row), *row.budget_bound]) or None,
    }


def _measured(name: str, measure: Measure) -> Record:
    low, high = measure.bounds or (None, None)
    return {name: measure.mean, f"{name}_low": low, f"{name}_high": high}


def comma_separated(found: Sequence[Mapping[str, Any]]) -> str:
    """Return records as comma-separated values with a line of headings.

    Args:
        found: Of equal columns, one at least.

    Returns:
        One line each; ``None`` is empty.
    """
    buffer = StringIO()
    writer = csv.DictWriter(buffer, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"${character}$" for character in "|<>"},
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
}
_NOTHING = "\N{EN DASH}"


def escaped(words: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in words)


def latex(cards: Sequence[Card], *, metrics: Sequence[str] = ()) -> str:
    """Return the scores as LaTeX tables, one for each network and data set; they need booktabs.

    Args:
        cards: Of one run.
        metrics: To show; by default the report's leading ones.

    Returns:
        ``table`` environments. Each score stands with its interval and beside the best guess that
        read no message; reasons not to trust a row are notes below its table.

    Raises:
        ExportError: Nothing was scored, or not in one of these metrics.
    """
    found = cells(cards)
    scored = [row for row in found if row.first.status == "done" and row.measures]
    if not scored:
        raise ExportError(
            "nothing was scored here, so there is no table; `leakbed report` says why"
        )
    known = dict.fromkeys(
        name
        for name in (*METRIC_IN_WORDS, *(own for row in scored for own in row.own_metrics))
        if any(name in row.measures for row in scored)
    )
    for metric in metrics:
        if metric not in known:
            raise ExportError(unknown_name("metric of these results", metric, known))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in scored:
        groups.setdefault((row.first.model, row.first.data), []).append(row)
    lost = Counter(row.first.status for row in found if row.first.status != "done")
    left_out = [f"% Not in a table: {count} rows of status {name}." for name, count in lost.items()]
    demo = ["% A demonstration: the budget was cut."] if any(card.demo for card in cards) else []
    head = ["% Needs \\usepackage{booktabs}.", *left_out, *demo]
    return "\n".join([*head, *(_table(*names, rows, metrics) for names, rows in groups.items())])


def _table(model: str, data: str, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return one table environment."""
    own = list(dict.fromkeys(name for row in rows for name in row.own_metrics))
    chosen = metrics or (*leading(rows), *own)
    shown = [name for name in chosen if any(name in row.measures for row in rows)]
    words = [escaped(METRIC_IN_WORDS.get(name, name)) for name in shown]
    heads = ["attack", "setting", *(h for word in words for h in (word, "no message")), "accuracy"]
    notes: dict[str, str] = {}
    lines = [_line(row, shown, notes) for row in rows]
    said = [f"$^{{{mark}}}$ {escaped(note)}." for note, mark in notes.items()]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{"
            + escaped(f"{model} on {data}. ")
            + "Rates with their exact 95\\% interval, other scores with two standard errors; "
            "beside each the best guess that reads no message.}",
            r"\label{tab:" + re.sub(r"[^a-z0-9]+", "-", f"{model}-{data}".lower()) + "}",
            r"\begin{tabular}{ll" + "l" * (2 * len(shown) + 1) + "}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\footnotesize", " ".join(said)] if said else []),
            r"\end{table}",
        ]
    )


def _line(row: Row, shown: Sequence[str], notes: dict[str, str]) -> str:
    """Return one line of a table, and note the reasons not to trust it."""
    reasons = "; ".join([*doubts(row), *row.budget_bound, *_failures(row)])
    mark = f"$^{{{notes.setdefault(reasons, str(len(notes) + 1))}}}$" if reasons else ""
    parts = [escaped(row.first.attack) + mark, escaped(setting(row))]
    for metric in shown:
        measure, best = row.measures.get(metric), row.baseline(metric)
        parts.append(escaped(_NOTHING if measure is None else text(metric, measure)))
        none = measure is None or best is None
        parts.append(escaped(_NOTHING if none or best is None else value_text(metric, best[1])))
    utility = row.utility()
    parts.append(escaped(value_text("label_accuracy", utility[1].mean) if utility else _NOTHING))
    return " & ".join(parts) + r" \\"


def _failures(row: Row) -> list[str]:
    if not row.failures:
        return []
    return [f"{row.failures} of {row.targets} targets failed and count as failures"]


def write_figures(cards: Sequence[Card], folder: Path) -> list[Path]:
    """Write the figures of the report as SVG and PDF.

    Args:
        cards: Of one run.
        folder: Where they go; made where it is missing.

    Returns:
        The files: of leakage against accuracy with ceilings one for each kind of adversary, and
        one for each of two scores.

    Raises:
        ExportError: No result has both a score and a utility, of which the figures are.
    """
    # Drawing takes a second to import.
    from experiments.report.figures import charts  # noqa: PLC0415
    from experiments.report.opening import panels  # noqa: PLC0415

    scored = [row for row in cells(cards) if row.first.status == "done"]
    drawn = [*panels(scored), *charts(scored, keyed=True)]
    if not drawn:
        raise ExportError(
            "no result here has both a score and what was left of the task, so there is no figure"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for count, drawing in enumerate(drawn, start=1):
        name = re.sub(r"[^a-z0-9]+", "-", drawing.title.lower()).strip("-")
        files += drawing.save(folder, f"{count}-{name}")
    return files
