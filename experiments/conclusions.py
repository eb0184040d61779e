"""What the numbers say, as a few sentences that are generated and therefore say no more.

A difference is claimed only if it exceeds two standard errors; misses, failed controls and attacks
that do not beat what needs no evidence are named as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from experiments.comparison import families
from experiments.measures import Measure, difference, text, value_text
from experiments.report_cells import FAMILY_IN_WORDS, LEADING, METRIC_IN_WORDS, Cell, cells, grouped
from experiments.report_detection import noticed
from experiments.verdicts import caveats, diverged, misses, place, shortfall
from leakbed.cards import Card
from leakbed.metrics import HIGHER_LEAKS_MORE

_FEW = 4  # settings that one sentence can still tell one by one


def conclusions(cards: Iterable[Card], *, samples: Mapping[str, str] | None = None) -> list[str]:
    """Return what a set of results says, the most important first.

    Args:
        cards: Of one experiment.
        samples: For each card's key, what identifies the private samples it attacked, from
            :func:`experiments.report_pictures.samples`. Without it, cards of equal data, seed and
            number of samples are taken to share them.

    Returns:
        Whole sentences.
    """
    cards = list(cards)
    found = cells(cards)
    scored = [cell for cell in found if cell.first.status == "done" and cell.measures]
    attacks = [cell for cell in scored if cell.is_attack]
    if not attacks:
        nothing = "No attack was scored, so nothing can be said about leakage."
        return [nothing, *diverged(found)]
    said: list[str] = []
    for block in sorted(grouped(attacks, _network), key=_breadth):
        plain = [cell for cell in block if cell.first.defense == "none"]
        said += families(block, samples)
        said += [f"{_leak(same)} {shortfall(same, scored)}" for same in grouped(plain, _named)]
        protected = [cell for cell in block if cell.first.defense != "none"]
        said += [_defence(same, plain) for same in grouped(protected, _protected)]
    return [
        sentence.strip()
        for sentence in [
            *said,
            *noticed(cards),
            *misses(attacks),
            *diverged(found),
            *caveats(scored),
        ]
        if sentence
    ]


def _breadth(block: Sequence[Cell]) -> int:
    """Put networks that both families ran on first."""
    return -len({cell.family for cell in block})


def _network(cell: Cell) -> tuple[str, str, str]:
    """Return data and network of a cell, wherever it is cut."""
    model = cell.first.settings.get("model")
    kept = {k: v for k, v in model.items() if k != "cut"} if isinstance(model, dict) else {}
    return cell.first.model, cell.first.data, json.dumps(kept, sort_keys=True)


def _named(cell: Cell) -> tuple[str, str]:
    return cell.first.protocol, cell.first.attack


def _protected(cell: Cell) -> tuple[str, str, str]:
    return cell.first.protocol, cell.first.defense, json.dumps(cell.first.settings.get("defense"))


def _leak(same: Sequence[Cell]) -> str:
    """Say what one attack recovers without a defence, setting by setting if they are few."""
    card = same[0].first
    opening = (
        f"{card.attack} on {FAMILY_IN_WORDS[same[0].family]} ({card.protocol}; {card.model}, "
        f"{card.data}), no defence"
    )
    if len(same) == 1:
        return f"{opening}: {_scores(same[0])}."
    if len(same) <= _FEW:
        parts = [
            f"{place(cell, same)}, {_scores(cell, brief=cell is not same[0])}" for cell in same
        ]
        return f"{opening}: {'; '.join(parts)}."
    return f"{opening}, over {len(same)} settings: {_range(same)}."


def _scores(cell: Cell, *, brief: bool = False) -> str:
    """Return the leading scores of a cell with their errors."""
    parts = []
    for metric in LEADING:
        if (measure := cell.measures.get(metric)) is not None:
            part = f"{METRIC_IN_WORDS[metric]} {text(metric, measure)}"
            if metric == "identification" and not brief:
                part += f" among {_candidates(cell)}"
            if metric == "ssim" and (skill := cell.measures.get("ssim_skill")) is not None:
                part += f" (skill {value_text('ssim_skill', skill.mean)})"
            parts.append(part)
    return ", ".join(parts) or "no leading score"


def _candidates(cell: Cell) -> str:
    known = cell.first.scores.get("candidates")
    return f"{known:,} candidates" if isinstance(known, int) else "the candidates"


def _range(same: Sequence[Cell]) -> str:
    """Return the extremes of the first leading score that every cell of many has."""
    metric = next((name for name in LEADING if all(name in cell.measures for cell in same)), None)
    if metric is None:
        return "no score that all of them have"
    ordered = sorted(same, key=lambda cell: cell.measures[metric].mean)
    low, high = ordered[0].measures[metric], ordered[-1].measures[metric]
    if difference(high, low) is None:
        ends = f"{text(metric, low)} to {text(metric, high)}, no more apart than chance allows"
    else:
        ends = (
            f"{text(metric, low)} ({place(ordered[0], same)}) to "
            f"{text(metric, high)} ({place(ordered[-1], same)})"
        )
    return f"{METRIC_IN_WORDS[metric]} from {ends}"


def _defence(same: Sequence[Cell], plain: Sequence[Cell]) -> str:
    """Say what one defence changes, beside what it leaves of the task."""
    card = same[0].first
    pairs = [(bare, cell) for cell in same if (bare := _undefended(cell, plain)) is not None]
    if not pairs:
        return ""
    strength = f" ({same[0].variant})" if same[0].variant else ""
    prices = [_price(bare, cell) for bare, cell in pairs]
    alike = len(set(prices)) == 1
    clauses = [
        _effect(bare, cell) + ("" if alike else price)
        for (bare, cell), price in zip(pairs, prices, strict=True)
    ]
    shown = "; ".join(clauses[:_FEW])
    rest = f"; {len(clauses) - _FEW} more settings are in the table" if clauses[_FEW:] else ""
    price = prices[0] if alike else ""
    return f"With {card.defense}{strength} on {card.protocol}, {shown}{rest}{price}."


def _undefended(cell: Cell, plain: Sequence[Cell]) -> Cell | None:
    """Return the cell that differs in the defence alone."""
    return next((other for other in plain if _bare(other) == _bare(cell)), None)


def _bare(cell: Cell) -> tuple[object, ...]:
    card = cell.first
    kept = {k: v for k, v in card.settings.items() if k not in {"seed", "case", "defense"}}
    return cell.case, card.protocol, card.cut, card.nodes, card.attack, json.dumps(kept)


def _effect(bare: Cell, cell: Cell) -> str:
    changes = [
        change
        for metric in LEADING
        if (change := _change(metric, bare.measures.get(metric), cell.measures.get(metric)))
    ]
    where = "" if cell.cut is None else f" at cut {cell.cut}"
    if not changes:
        return f"{cell.first.attack}{where} changes by no more than two standard errors"
    return f"{cell.first.attack}{where}: {', '.join(changes)}"


def _change(metric: str, before: Measure | None, after: Measure | None) -> str:
    """Say that a score fell or rose, or nothing if that may be chance."""
    if before is None or after is None or (gap := difference(after, before)) is None:
        return ""
    verb = "falls" if (gap < 0) == HIGHER_LEAKS_MORE[metric] else "rises"
    ends = f"from {value_text(metric, before.mean)} to {value_text(metric, after.mean)}"
    return f"{METRIC_IN_WORDS[metric]} {verb} {ends}"


def _price(bare: Cell, cell: Cell) -> str:
    before, after = bare.utility(), cell.utility()
    if before is None or after is None:
        return ""
    with_it, without = (value_text("label_accuracy", end[1].mean) for end in (after, before))
    return f" ({after[0]} {with_it} with it, {without} without)"
