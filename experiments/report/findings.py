"""What the numbers say, as a few sentences that are generated and therefore say no more.

A difference is claimed only if it exceeds two standard errors; misses, failed controls and attacks
that do not beat what needs no evidence are named as such.

Which family of protocols leaks more is said cut by cut and score by score, by the strongest attack
on each. The families are compared only where both attacked the same private samples on the same
network. One of them is named only where it is ahead and beats guessing, both by two standard
errors: of two failures neither leaks more. Victims that learnt unequally well are said to have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from experiments.report.caveats import beats_guessing, caveats, diverged, misses, place, shortfall
from experiments.report.detection import noticed
from experiments.report.rows import (
    FAMILY_IN_WORDS,
    LEADING,
    METRIC_IN_WORDS,
    Row,
    cells,
    grouped,
    leading,
)
from experiments.report.statistics import Measure, difference, text, value_text
from experiments.results.cards import Card
from leakbed.oracle.metrics import HIGHER_LEAKS_MORE

Verdict = Literal["weight exchange", "split learning", "unclear", "guessing"]

_CLAUSES: dict[Verdict, str] = {
    "weight exchange": "weight exchange leaks more",
    "split learning": "split learning leaks more",
    "unclear": "no clear difference",
    "guessing": "neither beats guessing",
}
_MOST = 3  # clauses that are still read as one verdict on a cut
_LITTLE = 0.05  # two standard errors of an accuracy on 400 test images are no more than this


def families(block: Sequence[Row], samples: Mapping[str, str] | None) -> list[str]:
    """Compare the strongest attack of each family, defence by defence.

    Args:
        block: Attacks on one network and data set.
        samples: What identifies the private samples, by card key; ``None`` if that is not known.

    Returns:
        One conclusion per defence under which both families were attacked.
    """
    said = []
    for same in grouped(block, lambda cell: cell.first.defense):
        weights = [cell for cell in same if cell.family == "weights"]
        split = [cell for cell in same if cell.family == "split"]
        pairs = [(a, b) for a in weights for b in split if _same_samples(a, b, samples)]
        if pairs:
            strongest = max((a for a, _ in pairs), key=_strength)
            rivals = [b for a, b in pairs if a is strongest]
            by_cut = grouped(rivals, lambda cell: cell.cut)
            said.append(_comparison(strongest, [max(each, key=_strength) for each in by_cut]))
        elif weights and split:
            said.append(
                f"Weight exchange and split learning ({weights[0].first.model}, "
                f"{weights[0].first.data}) attacked different private samples "
                f"{_under(same[0])}, so they are not compared."
            )
    return said


def _same_samples(first: Row, second: Row, samples: Mapping[str, str] | None) -> bool:
    return _samples(first, samples) == _samples(second, samples)


def _samples(cell: Row, samples: Mapping[str, str] | None) -> list[object]:
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


def _strength(cell: Row) -> tuple[float, ...]:
    """Order attacks by what speaks for a family: pictures first, then labels."""
    return tuple(
        cell.measures[metric].mean if metric in cell.measures else -1.0
        for metric in ("abs_pearson", "label_accuracy")
    )


def _comparison(weights: Row, rivals: Sequence[Row]) -> str:
    """Say cut by cut which family leaks more, score by score, and at what utility."""
    clauses = [clause for rival in rivals if (clause := _duel(weights, rival, rivals))]
    if not clauses:
        return ""
    attacks = " or ".join(dict.fromkeys(cell.first.attack for cell in rivals))
    return (
        f"On the same private samples and the same network ({weights.first.model}, "
        f"{weights.first.data}), {_under(weights)}, {weights.first.attack} on weight exchange and "
        f"{attacks} on split learning: {'; '.join(clauses)}.{_utilities(weights, rivals)}"
    )


def _under(cell: Row) -> str:
    return "without a defence" if cell.first.defense == "none" else f"with {cell.first.defense}"


def _duel(weights: Row, split: Row, rivals: Sequence[Row]) -> str:
    """Return who leaks more at one cut, in which scores; nothing if they share no score."""
    told: dict[Verdict, list[str]] = {verdict: [] for verdict in _CLAUSES}
    for metric in LEADING:
        if metric in weights.measures and metric in split.measures:
            verdict = _verdict(weights, split, metric)
            told[verdict].append(_family_scores(weights, split, metric=metric, verdict=verdict))
    clauses = [f"{_CLAUSES[verdict]} ({', '.join(each)})" for verdict, each in told.items() if each]
    if len(clauses) > _MOST:
        open_ = ", ".join([*told["unclear"], *told["guessing"]])
        clauses[_MOST - 1 :] = [f"no verdict in the rest ({open_})"]
    where = f"at cut {split.cut} " if len(rivals) > 1 else ""
    return where + ", ".join(clauses) if clauses else ""


def _verdict(weights: Row, split: Row, metric: str) -> Verdict:
    """Return the family that leaks more in one score, or why none can be named."""
    beaten = {cell.family: beats_guessing(cell, metric) for cell in (weights, split)}
    if not any(beaten.values()):
        return "guessing" if _guesses(weights, split, metric=metric) else "unclear"
    gap = difference(weights.measures[metric], split.measures[metric])
    if gap is None:
        return "unclear"
    ahead: Verdict = "weight exchange" if gap > 0 else "split learning"
    # A lead whose own error reaches down to guessing is no finding, whatever the other family's is.
    return ahead if beaten["weights" if gap > 0 else "split"] else "unclear"


def _family_scores(weights: Row, split: Row, *, metric: str, verdict: Verdict) -> str:
    """Return both families' scores, the winner's first, and what guessing has where that counts."""
    pair = (split, weights) if verdict == "split learning" else (weights, split)
    values = " against ".join(value_text(metric, cell.measures[metric].mean) for cell in pair)
    scores = f"{METRIC_IN_WORDS[metric]} {values}"
    if verdict != "guessing":
        return scores
    return f"{scores} where guessing has {' and '.join(_guesses(*pair, metric=metric))}"


def _guesses(*pair: Row, metric: str) -> list[str]:
    """Return what guessing scores against each of two cells, once if it is the same."""
    found = [free[1] for cell in pair if (free := cell.baseline(metric)) is not None]
    return list(dict.fromkeys(value_text(metric, guess) for guess in found))


def _utilities(weights: Row, rivals: Sequence[Row]) -> str:
    """Say how well the victims learnt, if one family's did clearly better."""
    own = _accuracy(weights)
    others = [value for cell in rivals if (value := _accuracy(cell)) is not None]
    if own is None or not others or all(abs(own - other) <= _LITTLE for other in others):
        return ""
    ends = [value_text("label_accuracy", end) for end in (min(others), max(others))]
    return (
        f" The victims' test accuracy is {value_text('label_accuracy', own)} under weight exchange "
        f"and {' to '.join(dict.fromkeys(ends))} under split learning, so their leakage is "
        "compared at unequal utility."
    )


def _accuracy(cell: Row) -> float | None:
    """Return the test accuracy a cell's victim reached, if it was measured."""
    utility = cell.utility()
    return utility[1].mean if utility is not None and utility[0] == "test accuracy" else None


_FEW = 4  # settings that one sentence can still tell one by one


def conclusions(cards: Iterable[Card], *, samples: Mapping[str, str] | None = None) -> list[str]:
    """Return what a set of results says, the most important first.

    Args:
        cards: Of one experiment.
        samples: For each card's key, what identifies the private samples it attacked, from
            :func:`experiments.report.pictures.samples`. Without it, cards of equal data, seed and
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
        said += [_defense(same, plain) for same in grouped(protected, _protected)]
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


def _breadth(block: Sequence[Row]) -> int:
    """Put networks that both families ran on first."""
    return -len({cell.family for cell in block})


def _network(cell: Row) -> tuple[str, str, str]:
    """Return data and network of a cell, wherever it is cut."""
    model = cell.first.settings.get("model")
    kept = {k: v for k, v in model.items() if k != "cut"} if isinstance(model, dict) else {}
    return cell.first.model, cell.first.data, json.dumps(kept, sort_keys=True)


def _named(cell: Row) -> tuple[str, str]:
    return cell.first.protocol, cell.first.attack


def _protected(cell: Row) -> tuple[str, str, str]:
    return cell.first.protocol, cell.first.defense, json.dumps(cell.first.settings.get("defense"))


def _leak(same: Sequence[Row]) -> str:
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


def _scores(cell: Row, *, brief: bool = False) -> str:
    """Return the leading scores of a cell with their errors."""
    parts = []
    for metric in leading([cell]):
        if (measure := cell.measures.get(metric)) is not None:
            part = f"{METRIC_IN_WORDS[metric]} {text(metric, measure)}"
            if metric == "identification" and not brief:
                part += f" among {_candidates(cell)}"
            if metric == "ssim" and (skill := cell.measures.get("ssim_skill")) is not None:
                part += f" (skill {value_text('ssim_skill', skill.mean)})"
            parts.append(part)
    return ", ".join(parts) or "no leading score"


def _candidates(cell: Row) -> str:
    known = cell.first.scores.get("candidates")
    return f"{known:,} candidates" if isinstance(known, int) else "the candidates"


def _range(same: Sequence[Row]) -> str:
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


def _defense(same: Sequence[Row], plain: Sequence[Row]) -> str:
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


def _undefended(cell: Row, plain: Sequence[Row]) -> Row | None:
    """Return the cell that differs in the defence alone."""
    return next((other for other in plain if _bare(other) == _bare(cell)), None)


def _bare(cell: Row) -> tuple[object, ...]:
    card = cell.first
    kept = {k: v for k, v in card.settings.items() if k not in {"seed", "case", "defense"}}
    return cell.case, card.protocol, card.cut, card.nodes, card.attack, json.dumps(kept)


def _effect(bare: Row, cell: Row) -> str:
    changes = [
        change
        for metric in leading([bare])
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


def _price(bare: Row, cell: Row) -> str:
    before, after = bare.utility(), cell.utility()
    if before is None or after is None:
        return ""
    with_it, without = (value_text("label_accuracy", end[1].mean) for end in (after, before))
    return f" ({after[0]} {with_it} with it, {without} without)"
