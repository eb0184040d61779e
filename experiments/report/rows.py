"""Cells as a report shows them: cards that differ only in their seed are one.

Cells come in a readable order, and each says by which settings it differs from its namesakes.

**Imbalanced labels.** Where one label is common, always guessing it is often right, and a defence
that costs an attack half of its accuracy may have changed the guesses of that label alone. Balanced
label accuracy then stands beside label accuracy.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, TypeVar

from scipy.stats import binom

from experiments.report.statistics import Measure, number, pooled
from experiments.results.cards import Card, read_cards
from experiments.results.folder import ReportError, last_run
from leakbed.contracts import Evidence
from leakbed.oracle import NEEDS_TRUTH
from leakbed.oracle.metrics import BEST_IS_ONE, HIGHER_LEAKS_MORE
from strategies import PROTOCOLS

SEEDED = frozenset({"seed", "case"})
"""Settings that differ from seed to seed of one cell."""

_NONE = "null"
_STACK = "stack"


def differing(settings: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """Return the settings that tell a cell from its namesakes.

    Args:
        settings: Of the cell.
        among: Of all cells of its name, itself included.

    Returns:
        Names and values such as ``scale 0.1, steps unset``; empty where nothing differs.
    """
    tables = [flat_settings(each) for each in among]
    own = defaultdict(lambda: _NONE, flat_settings(settings))
    keys = dict.fromkeys(key for table in (own, *tables) for key in table)
    telling = [key for key in keys if len({table.get(key, _NONE) for table in tables}) > 1]
    return ", ".join(f"{key.rpartition('.')[2]} {_told(own[key])}" for key in telling)


def _told(value: str) -> str:
    return "unset" if value == _NONE else value.strip('"')


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by dotted key, as JSON text, without the seed and the case's name.

    Args:
        settings: Of a card.
        prefix: What stands before each key.

    Returns:
        In the order of the settings. The second of two equal defences in a stack is numbered.
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        inner = _stacked(value) if name == _STACK else value
        if isinstance(inner, Mapping):
            found |= flat_settings(inner, f"{prefix}{name}.")
        elif prefix or name not in SEEDED:
            found[f"{prefix}{name}"] = json.dumps(value)
    return found


def _stacked(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a stack's settings by the names of its defences, of which one may stand twice."""
    named: dict[str, Any] = {}
    for name, own in pairs:
        again = sum(other.partition(" ")[0] == name for other in named)
        named[f"{name} {again + 1}" if again else name] = own
    return named


Family = Literal["weights", "split"]

FAMILY_IN_WORDS: dict[Family, str] = {"weights": "weight exchange", "split": "split learning"}

METRIC_IN_WORDS: dict[str, str] = {
    "identification": "identification",
    "abs_pearson": "|Pearson|",
    "ssim": "SSIM",
    "ssim_skill": "SSIM skill",
    "label_accuracy": "label accuracy",
    "balanced_accuracy": "balanced label accuracy",
    "leak_auc": "leak AUC",
    "cluster_accuracy": "label accuracy under the best naming (upper bound)",
    "attribute_accuracy": "attribute accuracy",
    "class_rate": "called the class",
    "misclassification": "misclassified",
    "nearest_real": "nearest real image",
    "diversity": "diversity",
    "mse": "MSE",
    "psnr": "PSNR",
    "affine_mse": "affine MSE",
}

LEADING = (*BEST_IS_ONE, "nearest_real")
"""The metrics that sentences and tables lead with; of all of them more is a greater leak."""

SMASHED_PICTURE = "smashed-as-image"
"""Reads a message and so declares evidence, yet only shows what was sent: no attack either."""

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a report.

    Attributes:
        cards: The same settings under one or several seeds.
        variant: The settings that tell this cell from others of the same name, as text.
        diverged: Seeds of the same settings whose training diverged: cells of their own, in no
            average of this one.
    """

    cards: tuple[Card, ...]
    variant: str = ""
    diverged: int = 0

    @property
    def first(self) -> Card:
        """The card whose pictures are shown and whose words are printed."""
        return self.cards[0]

    @property
    def case(self) -> str:
        """The experiment's name of the setting, without its seed."""
        return unseeded(self.first.case)

    @property
    def family(self) -> Family:
        """What its protocol exchanges."""
        return family(self.first)

    @property
    def cut(self) -> int | str | None:
        """Where its network is cut; ``None`` for a protocol that does not cut."""
        return None if self.family == "weights" else self.first.cut

    @property
    def is_attack(self) -> bool:
        """Whether it is an attack rather than what a score is worth without one."""
        return not _is_no_attack(self.first)

    @property
    def failures(self) -> int:
        """Targets without a usable guess, over all seeds."""
        return sum(int(number(card.scores.get("failures")) or 0) for card in self.cards)

    @property
    def targets(self) -> int:
        """Attacked messages, over all seeds."""
        return sum(int(number(card.scores.get("targets")) or 0) for card in self.cards)

    @property
    def unreliable(self) -> list[str]:
        """Every distinct reason not to trust the numbers."""
        return list(dict.fromkeys(card.unreliable for card in self.cards if card.unreliable))

    @property
    def budget_bound(self) -> list[str]:
        """Every distinct mark of a card whose scores a larger budget may change."""
        return list(dict.fromkeys(card.budget_bound for card in self.cards if card.budget_bound))

    @property
    def above_ceiling(self) -> list[str]:
        """Every distinct mark of cards above their ceiling, or of noise that is not as claimed."""
        said = [card.above_ceiling for card in self.cards]
        noise = [each for card in self.cards for each in card.noise_doubts]
        return list(dict.fromkeys([*filter(None, said), *noise]))

    @property
    def ceiling(self) -> tuple[float, float] | None:
        """The mean of the seeds' ceilings of rows, with error; None unless every seed has one."""
        return self.ceiling_of("row")

    def ceiling_of(self, game: str) -> tuple[float, float] | None:
        """Return the mean of the seeds' ceilings of one game with its error.

        Args:
            game: As for :class:`~experiments.results.cards.Bound`.

        Returns:
            None unless every seed has one.
        """
        bounds = [card.ceiling for card in self.cards if card.ceiling and card.ceiling.game == game]
        values = [each.ceiling for each in bounds if each.ceiling is not None]
        if not values or len(values) < len(self.cards):
            return None
        own = [each.error or 0.0 for each in bounds]
        within = sqrt(sum(error**2 for error in own)) / len(values)
        between = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
        return fmean(values), max(within, between)

    @property
    def control_within(self) -> bool | None:
        """Whether every seed's negative control stayed at the baselines; ``None``: none was run."""
        verdicts = [card.control.get("within") for card in self.cards if card.control]
        known = [verdict for verdict in verdicts if verdict is not None]
        return all(known) if known else None

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Every metric the cards have."""
        names = dict.fromkeys(name for card in self.cards for name in card.scores)
        found = {name: pooled([card.scores for card in self.cards], name) for name in names}
        return {name: measure for name, measure in found.items() if measure is not None}

    @cached_property
    def own_metrics(self) -> dict[str, bool]:
        """The metrics of the user's own, and whether more of each is a greater leak."""
        return {
            name: bool(entry["higher_leaks_more"])
            for card in self.cards
            for name, entry in card.scores.items()
            if isinstance(entry, dict) and "higher_leaks_more" in entry
        }

    def baseline(self, metric: str) -> tuple[str, float] | None:
        """Return the best evidence-free baseline of a metric: its name and value."""
        known = self.baselines(metric)
        free = {name: known[name] for name in known if name not in NEEDS_TRUTH}
        if not free:
            return None
        choose = max if ({**self.own_metrics, **HIGHER_LEAKS_MORE}).get(metric, True) else min
        best = choose(free, key=lambda name: free[name])
        return best, free[best]

    def baselines(self, metric: str) -> dict[str, float]:
        """Return every baseline of a metric, its mean over the seeds."""
        found: dict[str, list[float]] = {}
        for card in self.cards:
            for name, values in card.baselines.items():
                if (value := values.get(metric)) is not None:
                    found.setdefault(name, []).append(value)
        return {name: fmean(values) for name, values in found.items()}

    def baseline_measure(self, metric: str, name: str) -> Measure | None:
        """Return a baseline's mean over the seeds with its error; ``None`` where it is not known.

        The error is what the cards say of each seed, or the spread between seeds where that is
        more. Cards of before they said so have their control's limit, two errors of a difference of
        which a baseline is one part.
        """
        tables = [card.baselines.get(name, {}) for card in self.cards]
        means = [value for table in tables if (value := table.get(metric)) is not None]
        if not means:
            return None
        said = [table.get(f"{metric}_stderr") for table in tables]
        known = [error for error in said if error is not None]
        own = sqrt(sum(error**2 for error in known)) / len(means)
        own = own if len(known) == len(means) else self._control_error(metric)
        between = stdev(means) / sqrt(len(means)) if len(means) > 1 else 0.0
        return Measure(mean=fmean(means), stderr=max(own, between))

    def _control_error(self, metric: str) -> float:
        """Return the error that the cards' controls allow a metric's baselines, 0 if unknown."""
        found = [0.0]
        for card in self.cards:
            table = (card.control or {}).get("baseline")
            entry = table.get(metric) if isinstance(table, dict) else None
            if isinstance(entry, dict):
                value, limit = number(entry.get("value")), number(entry.get("limit"))
                found.append((limit - value) / 2 if value is not None and limit is not None else 0)
        return max(found)

    def utility(self) -> tuple[str, Measure] | None:
        """Return the name and value of what was left of the task, if it was measured."""
        for name in ("test_accuracy", "accuracy", *self.first.utility):
            if (measure := pooled([card.utility for card in self.cards], name)) is not None:
                return name.replace("_", " "), measure
        return None

    def cost(self, name: str) -> float | None:
        """Return a cost, its mean over the seeds."""
        values = [number(card.cost.get(name)) for card in self.cards]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None


def cells(cards: Iterable[Card]) -> list[Row]:
    """Pool cards that differ only in their seed, in a stable and readable order.

    Args:
        cards: Of one experiment.

    Returns:
        By network and data (what most cards have first), weight exchange before split, then by cut,
        case, defence (none first) and attack.
    """
    groups: dict[str, list[Card]] = {}
    cards = list(cards)
    sizes = Counter((card.model, card.data) for card in cards)
    for card in sorted(cards, key=lambda card: (-sizes[card.model, card.data], *_order(card))):
        groups.setdefault(_identity(card), []).append(card)
    lost = Counter(_settings(card) for card in cards if card.status == "diverged")
    found = [Row(cards=tuple(own), diverged=lost[_settings(own[0])]) for own in groups.values()]

    def kin(cell: Row) -> tuple[object, ...]:
        return *_name(cell.first), cell.first.status == "unfit"  # pairs that never ran stay apart

    names = {kin(same[0]): same for same in grouped(found, kin)}
    return [replace(cell, variant=_variant(cell, names[kin(cell)])) for cell in found]


def grouped(found: Iterable[Row], by: Callable[[Row], Key]) -> list[list[Row]]:
    """Return cells of equal keys together, groups and cells in the order they came in."""
    groups: dict[Key, list[Row]] = {}
    for cell in found:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """The results of a folder's last run.

    Attributes:
        name: The run's.
        cards: The newest of each cell and seed.
        written: When each was written, by its key.
        older: How many cards of these cells other code made earlier; they are left out.
        others: How many cards of other runs the folder holds; they are left out.
    """

    name: str
    cards: list[Card]
    written: Mapping[str, float]
    older: int
    others: int


def read_last_run(folder: Path) -> LastRun:
    """Read the results of a folder's last run.

    A card that cannot be read is a :class:`experiments.results.cards.CardError` that names the
    file.

    Args:
        folder: The results folder.

    Returns:
        One card at least.

    Raises:
        ReportError: The folder holds no card, or none of its last run.
    """
    cards = read_cards(folder)
    if not cards:
        raise ReportError(
            f"no results in {folder}: it has no cards/*.json; give the folder that `leakbed run` "
            "or `leakbed compare` wrote with --out"
        )
    name, found = last_run(folder, cards)
    written = {card.key: _written_at(folder, card) for card in found}
    old = superseded(found, written)
    return LastRun(
        name=name,
        cards=[card for card in found if card not in old],
        written=written,
        older=len(old),
        others=len(cards) - len(found),
    )


def _written_at(folder: Path, card: Card) -> float:
    return (folder / "cards" / f"{card.key}.json").stat().st_mtime


def superseded(cards: Sequence[Card], written: Mapping[str, float]) -> list[Card]:
    """Return the cards of cells that were run again later, by other code.

    Args:
        cards: All cards of a folder.
        written: When each was written, by its key.

    Returns:
        Those of which there is a newer one with equal settings and seeds.
    """
    newest: dict[str, Card] = {}
    for card in sorted(cards, key=lambda card: written[card.key]):
        newest[json.dumps([_name(card), card.settings, _seeds(card)], sort_keys=True)] = card
    return [card for card in cards if card not in newest.values()]


def family(card: Card) -> Family:
    """Return what a card's protocol exchanges; a foreign one is judged by what was read."""
    if card.protocol in PROTOCOLS:
        return PROTOCOLS[card.protocol].exchanges
    evidence = card.threat.evidence if card.threat else ()
    whole = "update" in evidence and card.threat is not None and card.threat.seat != "fed-server"
    return "weights" if whole or card.cut is None else "split"


def unseeded(case: str) -> str:
    """Return a case's name without the seed that a sweep wrote into it."""
    return re.sub(r"\s*\bseed=\d+", "", case).strip()


def _is_no_attack(card: Card) -> bool:
    """Say whether a card's guesses need no attack: they read no message, or only show one."""
    blind = card.threat is not None and card.threat.evidence == (Evidence.NOTHING,)
    return blind or card.attack == SMASHED_PICTURE


def _order(card: Card) -> tuple[object, ...]:
    return (
        card.model,
        card.data,
        family(card) == "split",
        -1 if card.cut is None else card.cut if isinstance(card.cut, int) else inf,
        str(card.cut),  # paths, after all indices
        unseeded(card.case),
        card.defense != "none",
        card.defense,
        _is_no_attack(card),
        card.attack,
        _seeds(card),
        card.key,
    )


def _seeds(card: Card) -> tuple[int, int]:
    """Return the seeds that a card's numbers were drawn from: of its run, and of its attack."""
    return card.seed, card.seed if card.attack_seed is None else card.attack_seed


def _name(card: Card) -> tuple[object, ...]:
    """Return what a reader tells cells apart by."""
    return (
        unseeded(card.case),
        card.protocol,
        card.data,
        card.model,
        card.cut,
        card.nodes,
        card.attack,
        card.defense,
    )


def versions(cards: Iterable[Card]) -> int:
    """Return of how many cells the seeds were computed by several versions of the code.

    A card's ``source`` is of the code that its own cell reaches, so two cells differ in it anyhow.
    """
    sources: dict[str, set[str]] = {}
    for card in cards:
        sources.setdefault(_unversioned(card), set()).add(card.source)
    return sum(len(each) > 1 for each in sources.values())


def _unversioned(card: Card) -> str:
    settings = {name: value for name, value in card.settings.items() if name not in SEEDED}
    return json.dumps([_name(card), settings], sort_keys=True)


def _settings(card: Card) -> str:
    """Return all that seeds of one cell have in common, whatever became of them."""
    return json.dumps([_unversioned(card), card.source])


def _identity(card: Card) -> str:
    return json.dumps(
        [_settings(card), card.status, card.status in {"unfit", "failed"} and card.why]
    )


def _variant(cell: Row, namesakes: Sequence[Row]) -> str:
    """Say the settings in which a cell differs from others of the same name."""
    return differing(cell.first.settings, [each.first.settings for each in namesakes])


BALANCED = "balanced_accuracy"
_COMMON = 1.5  # times its equal share: half as many again as where all labels are equally common
_RARE = 0.05


def imbalanced(cell: Row) -> bool:
    """Say whether one label is so common that always guessing it is right far above chance.

    Args:
        cell: Has scores; one of cards without balanced accuracy counts as balanced.

    Returns:
        Whether the majority's baseline exceeds 1.5 times chance, and by more than luck: among few
        samples some label is always commoner, so as many of it must be rarer than one in 20 were
        all labels equally likely, whichever of them it is.
    """
    common = cell.baselines("label_accuracy").get("majority-label")
    chance = cell.baselines(BALANCED).get("chance")
    if common is None or chance is None or BALANCED not in cell.measures:
        return False
    rows = max(cell.targets, 1) * int(number(cell.first.scores.get("rows")) or 1)
    lucky = float(binom.sf(round(common * rows) - 1, rows, chance)) / chance
    return common > _COMMON * chance and lucky < _RARE


def leading(cells: Iterable[Row]) -> tuple[str, ...]:
    """Return the metrics to lead with: of imbalanced labels the balanced accuracy too.

    Args:
        cells: To be shown together.

    Returns:
        The leading ones, of which the cells need not have every one.
    """
    if not any(imbalanced(cell) for cell in cells):
        return LEADING
    place = LEADING.index("label_accuracy") + 1
    return (*LEADING[:place], BALANCED, *LEADING[place:])
