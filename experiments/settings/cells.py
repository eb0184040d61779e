"""Cells: case x sweep x defence x attack, each with the settings it runs with and nothing more."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, TypeVar

from experiments.settings.plugins import (
    AttackSettings,
    DefenseSettings,
    JsonObject,
    TunedOn,
    is_adversary,
    is_intruder,
    round_number,
)
from experiments.settings.protocol import ProtocolSettings
from experiments.settings.schema import (
    CHOICES,
    SECTIONS,
    CeilingSettings,
    DataSettings,
    MetricSettings,
    ModelSettings,
    Settings,
    SettingsError,
    part_of,
)
from leakbed.contracts import ThreatModel
from leakbed.plugins import is_own, own_class
from leakbed.tensors import resolve_device

CHECKPOINT_EVERY = 100
"""Forged gradients between two measures, unless the experiment says otherwise."""
# Every card had these keys before options were their protocol's own. A protocol without them has
# them as null still, so that settings have the keys they always had; this list does not grow.
_ONCE_COMMON = ("sync", "gradient_scale", "merge")


@dataclass(frozen=True, kw_only=True)
class Hijacking:
    """The adversary at a run's server while it trains, and what the harness does beside it.

    Attributes:
        name: Its catalogue key.
        own: Its settings.
        checkpoint_every: Forged gradients, or batches watched, from one measure of what it can
            decode to the next.
        forges: Whether nodes get what it forges. The control run's adversary trains all the same,
            but its nodes get the gradients of the protocol.
        watches: Whether it is a passive attack that learns live, and so forges nothing.
    """

    name: str
    own: JsonObject
    checkpoint_every: int
    forges: bool = True
    watches: bool = False


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

    A run with an adversary beside it or a malicious client is never another attack's.

    Attributes:
        seed: From which its streams are derived.
        data: Its data.
        model: Its network.
        protocol: How it trains.
        defense: What protects it.
        device: Where parties compute.
        keep_rounds: Which rounds its trace keeps: the ``"last"``, ``"all"``, or those numbers.
        adversary: Who hijacks it, or watches it live; None where nobody does.
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
        """Return every setting as JSON values, and of the device the type that ``"auto"`` found."""
        return {
            "seed": self.seed,
            "data": self.data.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "protocol": {**dict.fromkeys(_ONCE_COMMON), **self.protocol.model_dump(mode="json")},
            "defense": self.defense.model_dump(mode="json", exclude={"everywhere", "called"}),
            "device": resolve_device(self.device).type,
            "keep_rounds": self.keep_rounds,
            **({"adversary": asdict(self.adversary)} if self.adversary else {}),
            **({"intruder": asdict(self.intruder)} if self.intruder else {}),
        }

    def plugins(self) -> tuple[str, ...]:
        """Return the names of everything that plays a part in it, keys and import paths.

        A protocol of the catalogue is left out: nodes do not hear of it, and are asked for their
        code by these names.
        """
        acting = [each.name for each in (self.adversary, self.intruder) if each is not None]
        if is_own(self.protocol.name):
            acting.append(self.protocol.name)
        return (*(name for name, _ in self.defense.stack), *acting)

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
        if self.adversary.watches:
            return f", watched by {self.adversary.name}"
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
        named: Of ``"attacks"`` and ``"defenses"`` those that its case names, rather than being
            tried with all there are.
        ceiling: What no attack exceeds is put beside the result, computed so; None for no such
            number.
        metrics: Those of one's own, beside the oracle's.
    """

    case: str
    training: Training
    attack: AttackSettings
    demo: bool
    named: frozenset[str] = frozenset(CHOICES)
    ceiling: CeilingSettings | None = None
    metrics: tuple[MetricSettings, ...] = ()

    @property
    def label(self) -> str:
        """What a user is told when the cell is done."""
        return f"{self.case}: {self.attack.name} / {self.training.defense.name}"

    def as_json(self) -> JsonObject:
        """Return every setting a result depends on as JSON values."""
        unread = {"reported", "everywhere", "called", "tuned_on"}
        unread |= set() if self.attack.grants else {"grants"}
        attack = self.attack.model_dump(mode="json", exclude=unread)
        measured = [each.model_dump(mode="json") for each in self.metrics]
        return {
            "case": self.case,
            **self.training.as_json(),
            "attack": attack,
            "demo": self.demo,
            **({"ceiling": self.ceiling.model_dump(mode="json")} if self.ceiling else {}),
            **({"metric": measured} if measured else {}),
        }

    def judged_by(self) -> tuple[str, ...]:
        """Return the names of what works on the finished run: its attack, and one's own metrics."""
        return (self.attack.name, *(each.name for each in self.metrics))


def cells(settings: Settings) -> list[CellSettings]:
    """Return every cell of an experiment, those of one training run beside each other.

    Args:
        settings: Checked.

    Returns:
        Cells in the order case, sweep, defence, attack; those with a training of their own last. An
        attack that would be reported on the rows its settings were chosen on is a
        :class:`~experiments.settings.schema.SettingsError`.
    """
    attacks = sorted(
        settings.attack,
        key=lambda attack: is_adversary(attack.name) or is_intruder(attack.name) or attack.live,
    )
    found = [
        CellSettings(
            case=case,
            training=_attacked(training, attack),
            attack=attack,
            demo=settings.demo,
            named=_named(settings, table),
            ceiling=settings.ceiling,
            metrics=settings.metric,
        )
        for table in settings.case or ({"name": settings.name},)
        for case, training in _trainings(settings, table, chosen(table, "attacks", attacks))
        for attack in chosen(table, "attacks", attacks)
    ]
    for cell in found:
        _refuse_tuned(cell)
    return found


def _named(settings: Settings, case: Mapping[str, Any]) -> frozenset[str]:
    """Return which choices a case makes itself; one case alone chooses all of its experiment's."""
    if not settings.case and not settings.sweep:
        return frozenset(CHOICES)
    return frozenset(key for key in CHOICES if case.get(key) is not None)


def _refuse_tuned(cell: CellSettings) -> None:
    """Refuse to report an attack on the very rows that its settings were chosen on."""
    tuned, seed = cell.attack.tuned_on, cell.training.seed
    attacked = "test" if cell.attack.when == "inference" else "private"
    if isinstance(tuned, TunedOn) and tuned.rows == attacked and seed in tuned.seeds:
        raise SettingsError(
            f"attack {cell.attack.choice}: its settings were chosen on the {tuned.rows} rows of "
            f"seed {seed} (tuned_on), which {cell.case!r} attacks; report other seeds than "
            f"{', '.join(map(str, tuned.seeds))}"
        )


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
    return [
        each for each in offered if (each.everywhere if names is None else each.choice in names)
    ]


def _attacked(training: Training, attack: AttackSettings) -> Training:
    """Return the run an attack needs; what acts or learns while it trains has one of its own."""
    if is_intruder(attack.name):
        intruding = Intruding(
            name=attack.name,
            own=attack.own,
            nodes=attack.nodes or (0,),
            samples=attack.targets,
        )
        return replace(training, intruder=intruding)
    if not is_adversary(attack.name) and not attack.live:
        return training
    hijacking = Hijacking(
        name=attack.name,
        own=attack.own,
        checkpoint_every=attack.checkpoint_every or CHECKPOINT_EVERY,
        forges=not attack.live,
        watches=attack.live,
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
        wanted |= set(range(1, number + 1)) if _reads_rounds(attack) else {number}
    if training.keep_rounds == "all" or wanted == {last}:
        return training
    return replace(training, keep_rounds=tuple(sorted(wanted)))


def _reads_rounds(attack: AttackSettings) -> bool:
    """Say whether an attack reads messages of several rounds; none of the catalogue does."""
    if not is_own(attack.name):
        return False
    threat: ThreatModel = own_class(attack.name, "attack")(**attack.own).threat
    return any(kind.rounds == "until" for kind in threat.evidence_kinds)


def _label(case: str, swept: Mapping[str, Any]) -> str:
    """Name a cell's case with the swept values that tell it apart."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in swept.items()]
    return " ".join([case, *parts])


def _training(
    settings: Settings, overrides: Mapping[str, Any], defense: DefenseSettings
) -> Training:
    data, model, protocol = (part_of(section, overrides) for section in SECTIONS)
    return Training(
        seed=overrides.get("seed", settings.seed),
        data=DataSettings(**{**settings.data.model_dump(), **data}),
        model=ModelSettings(**{**settings.model.model_dump(), **model}),
        protocol=settings.protocol.replaced(protocol),
        defense=defense,
        device=settings.device,
        keep_rounds=settings.keep_rounds,
    )
