"""Cells: case x sweep x defence x attack, each with the settings it runs with and nothing more."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, TypeVar

from experiments.plugins import adversary_names, intruder_names
from experiments.settings import (
    CHOICES,
    SECTIONS,
    AttackSettings,
    DataSettings,
    DefenseSettings,
    JsonObject,
    ModelSettings,
    Settings,
    SettingsError,
)
from experiments.settings_protocol import ProtocolSettings
from leakbed.targets import round_number

CHECKPOINT_EVERY = 100
"""Forged gradients between two measures, unless the experiment says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Hijacking:
    """The active adversary at a run's server, and what the harness does beside it.

    Attributes:
        name: Its catalogue key.
        own: Its settings.
        checkpoint_every: Forged gradients from one measure of what it can decode to the next.
        forges: Whether nodes get what it forges. The control run's adversary trains all the same,
            but its nodes get the gradients of the protocol.
    """

    name: str
    own: JsonObject
    checkpoint_every: int
    forges: bool = True


@dataclass(frozen=True, kw_only=True)
class Intruding:
    """The malicious client of a run.

    Attributes:
        name: Its catalogue key.
        own: Its settings.
        nodes: The partitions that are it, each by itself.
        samples: How many samples it is asked for after training.
    """

    name: str
    own: JsonObject
    nodes: tuple[int, ...]
    samples: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run; cells that differ only in a passive attack share it.

    A run with an active adversary or a malicious client is never a passive attack's.

    Attributes:
        seed: From which its streams are derived.
        data: Its data.
        model: Its network.
        protocol: How it trains.
        defense: What protects it.
        device: Where parties compute.
        keep_rounds: Which rounds its trace keeps: the ``"last"``, ``"all"``, or those numbers.
        adversary: Who hijacks it; None where the server follows the protocol.
        intruder: Which nodes do not follow it; None where all do.
    """

    seed: int
    data: DataSettings
    model: ModelSettings
    protocol: ProtocolSettings
    defense: DefenseSettings
    device: str
    keep_rounds: str | tuple[int, ...] = "last"
    adversary: Hijacking | None = None
    intruder: Intruding | None = None

    def as_json(self) -> JsonObject:
        """Return every setting as JSON values."""
        return {
            "seed": self.seed,
            "data": self.data.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "protocol": self.protocol.model_dump(mode="json"),
            "defense": self.defense.model_dump(mode="json", exclude={"everywhere"}),
            "device": self.device,
            "keep_rounds": self.keep_rounds,
            **({"adversary": asdict(self.adversary)} if self.adversary else {}),
            **({"intruder": asdict(self.intruder)} if self.intruder else {}),
        }

    def never_hijacked(self) -> "Training":
        """Return the control run: the adversary trains as ever, and its nodes never notice it."""
        if self.adversary is None:
            return self
        return replace(self, adversary=replace(self.adversary, forges=False))

    def attacker(self) -> str:
        """Say who attacks during the run, as the end of a sentence; empty where nobody does."""
        if self.intruder is not None:
            return f" with {self.intruder.name} at nodes {list(self.intruder.nodes)}"
        if self.adversary is None:
            return ""
        manner = "" if self.adversary.forges else " (control: it forges nothing)"
        return f" under {self.adversary.name}{manner}"

    def key(self, source: str) -> str:
        """Return the name of this run's folder: a hash of its settings and of what it ran on."""
        text = json.dumps([self.as_json(), source], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """One result to be: a training run and an attack on it.

    Attributes:
        case: Its name in the experiment.
        training: What is attacked.
        attack: By what.
        demo: Whether the budget is cut for a demonstration.
    """

    case: str
    training: Training
    attack: AttackSettings
    demo: bool

    @property
    def label(self) -> str:
        """What a user is told when the cell is done."""
        return f"{self.case}: {self.attack.name} / {self.training.defense.name}"

    def as_json(self) -> JsonObject:
        """Return every setting a result depends on as JSON values."""
        attack = self.attack.model_dump(mode="json", exclude={"reported", "everywhere"})
        return {
            "case": self.case,
            **self.training.as_json(),
            "attack": attack,
            "demo": self.demo,
        }


def cells(settings: Settings) -> list[CellSettings]:
    """Return every cell of an experiment, those of one training run beside each other.

    Args:
        settings: Checked.

    Returns:
        Cells in the order case, sweep, defence, attack; passive attacks before active ones.
    """
    active = {*adversary_names(), *intruder_names()}
    attacks = sorted(settings.attack, key=lambda attack: attack.name in active)
    return [
        CellSettings(
            case=case, training=_attacked(training, attack), attack=attack, demo=settings.demo
        )
        for table in settings.case or ({"name": settings.name},)
        for case, training in _trainings(settings, table, chosen(table, "attacks", attacks))
        for attack in chosen(table, "attacks", attacks)
    ]


Choice = TypeVar("Choice", AttackSettings, DefenseSettings)


def chosen(case: Mapping[str, Any], key: str, offered: Sequence[Choice]) -> list[Choice]:
    """Return the attacks or defences that a case tries.

    Args:
        case: Its table.
        key: ``"attacks"`` or ``"defenses"``.
        offered: The experiment's.

    Returns:
        Those that the case names, or, where it names none, those that are tried everywhere.
    """
    names = case.get(key)
    return [each for each in offered if (each.everywhere if names is None else each.name in names)]


def _attacked(training: Training, attack: AttackSettings) -> Training:
    """Return the run an attack needs: of an adversary or a malicious client, one of its own."""
    if attack.name in intruder_names():
        intruding = Intruding(
            name=attack.name,
            own=attack.own,
            nodes=attack.nodes or (0,),
            samples=attack.targets,
        )
        return replace(training, intruder=intruding)
    if attack.name not in adversary_names():
        return training
    hijacking = Hijacking(
        name=attack.name,
        own=attack.own,
        checkpoint_every=attack.checkpoint_every or CHECKPOINT_EVERY,
    )
    return replace(training, adversary=hijacking)


def _trainings(
    settings: Settings, case: Mapping[str, Any], attacks: Sequence[AttackSettings]
) -> Iterator[tuple[str, Training]]:
    fixed = {key: value for key, value in case.items() if key not in {"name", *CHOICES}}
    for values in product(*settings.sweep.values()):
        swept = dict(zip(settings.sweep, values, strict=True))
        for defense in chosen(case, "defenses", settings.defense):
            training = _training(settings, {**fixed, **swept}, defense)
            yield _label(case["name"], swept), _kept(training, attacks)


def _kept(training: Training, attacks: Sequence[AttackSettings]) -> Training:
    """Return a run that keeps every round which one of its attacks reads."""
    last = training.protocol.rounds
    wanted = {last}
    for attack in attacks:
        number = round_number(attack.collect, last=last)
        if number > last:
            raise SettingsError(
                f"attack {attack.name}: collect = {attack.collect}, but protocol.rounds is {last}"
            )
        if attack.when == "inference" and number != last:
            raise SettingsError(
                f"attack {attack.name}: when = 'inference' reads test rows, which are evaluated "
                f"after the last round only; collect = {attack.collect!r} is round {number} of "
                f"{last}"
            )
        wanted.add(number)
    if training.keep_rounds == "all" or wanted == {last}:
        return training
    return replace(training, keep_rounds=tuple(sorted(wanted)))


def _label(case: str, swept: Mapping[str, Any]) -> str:
    """Name a cell's case with the swept values that tell it apart."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in swept.items()]
    return " ".join([case, *parts])


def _training(
    settings: Settings, overrides: Mapping[str, Any], defense: DefenseSettings
) -> Training:
    merged: dict[str, JsonObject] = {
        section: getattr(settings, section).model_dump() for section in SECTIONS
    }
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if name:
            merged[section][name] = value
    return Training(
        seed=overrides.get("seed", settings.seed),
        data=DataSettings(**merged["data"]),
        model=ModelSettings(**merged["model"]),
        protocol=ProtocolSettings(**merged["protocol"]),
        defense=defense,
        device=settings.device,
        keep_rounds=settings.keep_rounds,
    )
