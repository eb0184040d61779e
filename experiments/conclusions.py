"""What the numbers say, as a few sentences that are generated and therefore say no more.

A difference is claimed only if it exceeds two standard errors; misses, failed controls and attacks
that do not beat what needs no evidence are named as such. The two families are compared only where
both attacked the same private samples on the same network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from experiments.measures import Measure, difference, text, value_text
from experiments.report_cells import FAMILY_IN_WORDS, METRIC_IN_WORDS, Cell, cells
from experiments.verdicts import caveats, misses, place, shortfalls
from leakbed.cards import Card
from leakbed.metrics import HIGHER_LEAKS_MORE

LEADING = ("identification", "abs_pearson", "ssim", "label_accuracy")
_FEW = 4  # settings that one sentence can still tell one by one

Key = TypeVar("Key")


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
    scored = [cell for cell in cells(cards) if cell.first.status == "done" and cell.measures]
    attacks = [cell for cell in scored if cell.is_attack]
    if not attacks:
        return ["No attack was scored, so nothing can be said about leakage."]
    said: list[str] = []
    for block in _grouped(attacks, _network):
        plain = [cell for cell in block if cell.first.defense == "none"]
        for same in _grouped(plain, _named):
            said.append(_leak(same))
            said += shortfalls(same, scored)
        said += _families(block, samples)
        for same in _grouped([cell for cell in block if cell not in plain], _protected):
            said.append(_defence(same, plain))
    return [sentence for sentence in [*said, *misses(attacks), *caveats(scored)] if sentence]


def _grouped(found: Iterable[Cell], by: Callable[[Cell], Key]) -> list[list[Cell]]:
    groups: dict[Key, list[Cell]] = {}
    for cell in found:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


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
        f"{FAMILY_IN_WORDS[same[0].family].capitalize()} ({card.protocol}, {card.model} on "
        f"{card.data}), no defence: {card.attack}"
    )
    if len(same) == 1:
        return f"{opening} reaches {_scores(same[0])}."
    if len(same) <= _FEW:
        parts = [f"{place(cell, same)}, {_scores(cell)}" for cell in same]
        return f"{opening} reaches, {'; '.join(parts)}."
    return f"{opening}, over {len(same)} settings: {_range(same)}."


def _scores(cell: Cell) -> str:
    """Return the leading scores of a cell with their errors."""
    parts = []
    for metric in LEADING:
        if (measure := cell.measures.get(metric)) is not None:
            part = f"{METRIC_IN_WORDS[metric]} {text(metric, measure)}"
            if metric == "identification":
                part += f" among {_candidates(cell)}"
            if metric == "ssim" and (skill := cell.measures.get("ssim_skill")) is not None:
                part += f", skill {value_text('ssim_skill', skill.mean)}"
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


def _families(block: Sequence[Cell], samples: Mapping[str, str] | None) -> list[str]:
    """Compare the strongest attack of each family on the same samples, defence by defence."""
    said = []
    for same in _grouped(block, lambda cell: cell.first.defense):
        weights = [cell for cell in same if cell.family == "weights"]
        split = [cell for cell in same if cell.family == "split"]
        by_cut = _grouped(split, lambda cell: cell.first.cut)
        # One sentence for each cut without a defence; with one, the strongest cut speaks for all.
        for rivals in by_cut if same[0].first.defense == "none" else [split]:
            pairs = [(a, b) for a in weights for b in rivals if _same_samples(a, b, samples)]
            if pairs:
                said.append(_comparison(*max(pairs, key=_strength)))
            elif weights and rivals:
                said.append(
                    f"Weight exchange and {place(rivals[0], rivals) or 'split learning'} "
                    "attacked different private samples here, so they are not compared."
                )
    return said


def _same_samples(first: Cell, second: Cell, samples: Mapping[str, str] | None) -> bool:
    return _samples(first, samples) == _samples(second, samples)


def _samples(cell: Cell, samples: Mapping[str, str] | None) -> list[object]:
    """Return what stands for the private samples of a cell, per seed."""
    if samples is not None:
        return [samples.get(card.key, card.key) for card in cell.cards]
    return [
        (card.seed, card.nodes, _count(card.scores, "targets") * _count(card.scores, "rows"))
        for card in cell.cards
    ]


def _count(scores: Mapping[str, object], name: str) -> int:
    value = scores.get(name, 1)
    return value if isinstance(value, int) else 1


def _strength(pair: tuple[Cell, Cell]) -> tuple[float, ...]:
    """Order pairs so that each family is represented by its strongest attack."""
    return tuple(
        sum(cell.measures[metric].mean for cell in pair if metric in cell.measures)
        for metric in ("abs_pearson", "label_accuracy")
    )


def _comparison(weights: Cell, split: Cell) -> str:
    """Say in which scores one family leaks more than the other."""
    verdicts: dict[str, list[str]] = {"more": [], "less": [], "equal": []}
    for metric in LEADING:
        own, other = weights.measures.get(metric), split.measures.get(metric)
        if own is None or other is None:
            continue
        gap = difference(own, other)
        verdict = "equal" if gap is None else "more" if gap > 0 else "less"
        numbers = f"{value_text(metric, own.mean)} against {value_text(metric, other.mean)}"
        verdicts[verdict].append(f"{METRIC_IN_WORDS[metric]} {numbers}")
    clauses = [
        f"{phrase} ({', '.join(verdicts[verdict])})"
        for verdict, phrase in (
            ("more", "leaks more than"),
            ("less", "leaks less than"),
            ("equal", "does not differ by more than two standard errors from"),
        )
        if verdicts[verdict]
    ]
    if not clauses:
        return ""
    defense = split.first.defense
    cut = "" if split.first.cut is None else f", cut {split.first.cut}"
    return (
        f"On the same private samples and the same network ({weights.first.model}), "
        f"{'without a defence' if defense == 'none' else f'with {defense}'}, weight exchange "
        f"({weights.first.attack}) {'; it '.join(clauses)} split learning "
        f"({split.first.attack}{cut})."
    )


def _defence(same: Sequence[Cell], plain: Sequence[Cell]) -> str:
    """Say what one defence changes, beside what it leaves of the task."""
    card = same[0].first
    pairs = [(bare, cell) for cell in same if (bare := _undefended(cell, plain)) is not None]
    if not pairs:
        return ""
    strength = f" ({same[0].variant})" if same[0].variant else ""
    clauses = [f"{_effect(bare, cell)}" for bare, cell in pairs]
    shown = "; ".join(clauses[:_FEW])
    rest = f"; {len(clauses) - _FEW} more settings are in the table" if clauses[_FEW:] else ""
    return f"{card.defense}{strength} on {card.protocol}: {shown}{rest}{_price(*pairs[0])}."


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
    where = "" if cell.first.cut is None else f" at cut {cell.first.cut}"
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
    return f" ({after[0]} {after[1].mean:.2f} with it, {before[1].mean:.2f} without)"
