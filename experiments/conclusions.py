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
from experiments.verdicts import caveats, misses, place, shortfall
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
    for block in sorted(_grouped(attacks, _network), key=_breadth):
        plain = [cell for cell in block if cell.first.defense == "none"]
        said += _families(block, samples)
        said += [f"{_leak(same)} {shortfall(same, scored)}" for same in _grouped(plain, _named)]
        protected = [cell for cell in block if cell.first.defense != "none"]
        said += [_defence(same, plain) for same in _grouped(protected, _protected)]
    return [
        sentence.strip() for sentence in [*said, *misses(attacks), *caveats(scored)] if sentence
    ]


def _breadth(block: Sequence[Cell]) -> int:
    """Put networks that both families ran on first."""
    return -len({cell.family for cell in block})


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


def _families(block: Sequence[Cell], samples: Mapping[str, str] | None) -> list[str]:
    """Compare the strongest attack of each family on the same samples, defence by defence."""
    said = []
    for same in _grouped(block, lambda cell: cell.first.defense):
        weights = [cell for cell in same if cell.family == "weights"]
        split = [cell for cell in same if cell.family == "split"]
        pairs = [(a, b) for a in weights for b in split if _same_samples(a, b, samples)]
        if pairs:
            strongest = max((a for a, _ in pairs), key=_strength)
            rivals = [b for a, b in pairs if a is strongest]
            by_cut = _grouped(rivals, lambda cell: cell.cut)
            said.append(_comparison(strongest, [max(each, key=_strength) for each in by_cut]))
        elif weights and split:
            said.append(
                f"Weight exchange and split learning ({weights[0].first.model}, "
                f"{weights[0].first.data}) attacked different private samples "
                f"{_under(same[0])}, so they are not compared."
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


def _strength(cell: Cell) -> tuple[float, ...]:
    """Order attacks by what speaks for a family: pictures first, then labels."""
    return tuple(
        cell.measures[metric].mean if metric in cell.measures else -1.0
        for metric in ("abs_pearson", "label_accuracy")
    )


def _comparison(weights: Cell, rivals: Sequence[Cell]) -> str:
    """Say in which scores weight exchange leaks more than split learning, cut by cut."""
    found = {metric: _against(metric, weights, rivals) for metric in LEADING}
    verdicts = {verdict for each in found.values() for verdict, _ in each}
    if not verdicts:
        return ""
    overall = {
        frozenset({"more"}): "leaks more than split learning",
        frozenset({"less"}): "leaks less than split learning",
        frozenset[str](): "does not differ from split learning by more than two standard errors",
    }.get(frozenset(verdicts - {"equal"}), "leaks more than split learning in some scores only")
    clauses = [
        f"{METRIC_IN_WORDS[metric]} {value_text(metric, weights.measures[metric].mean)} against "
        + ", ".join(text for _, text in each)
        for metric, each in found.items()
        if each
    ]
    attacks = " or ".join(dict.fromkeys(cell.first.attack for cell in rivals))
    return (
        f"On the same private samples and the same network ({weights.first.model}, "
        f"{weights.first.data}), {_under(weights)}, weight exchange {overall}: "
        f"{'; '.join(clauses)} ({weights.first.attack} against {attacks})."
    )


def _against(metric: str, weights: Cell, rivals: Sequence[Cell]) -> list[tuple[str, str]]:
    """Return for each rival that has a metric the verdict and the rival's value."""
    found = []
    own = weights.measures.get(metric)
    for rival in rivals:
        other = rival.measures.get(metric)
        if own is None or other is None:
            continue
        gap = difference(own, other)
        verdict = "equal" if gap is None else "more" if gap > 0 else "less"
        notes = [
            f"cut {rival.cut}" if len(rivals) > 1 else "",
            {"equal": "no clear difference", "less": "more"}.get(verdict, ""),
        ]
        note = ", ".join(part for part in notes if part)
        value = value_text(metric, other.mean)
        found.append((verdict, f"{value} ({note})" if note else value))
    return found


def _under(cell: Cell) -> str:
    return "without a defence" if cell.first.defense == "none" else f"with {cell.first.defense}"


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
    return f"With {card.defense}{strength} on {card.protocol}, {shown}{rest}{_price(*pairs[0])}."


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
    return f" ({after[0]} {after[1].mean:.2f} with it, {before[1].mean:.2f} without)"
