"""The tables of a settings file that name a plug-in: attacks and defences, with their own settings.

Read strictly and without torch: what a plug-in may be told is read from its source.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from experiments.plugins import PluginFields, adversary_names, intruder_names, plugin_fields
from experiments.settings_values import check_value
from leakbed.naming import unknown

JsonObject = dict[str, Any]
Round = Annotated[int, Field(ge=1, strict=True)]
_PASSIVE = {"restarts", "when", "collect"}
_ACTIVE = {"checkpoint_every", "when", "control"}
_INTRUDING = {"nodes", "control"}
_TOLD, KNOWN_PER_CLASS = {"known_per_class"}, 1
_COMMON = {"everywhere"}


class AttackSettings(BaseModel):
    """One attack: keys every attack has, and its own in ``own``.

    ``restarts`` and ``collect``, the round whose messages are attacked, are for passive attacks;
    ``checkpoint_every`` and ``control`` are for adversaries, see
    :class:`experiments.cells.Hijacking`; ``nodes`` and ``control`` are for malicious clients, see
    :class:`experiments.cells.Intruding`, whose samples ``targets`` counts. ``known_per_class`` is
    for attacks that know a few true labels: the first so many targets of each class. One that is
    not ``everywhere`` runs in the cases that name it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    targets: int = Field(default=8, ge=1, strict=True)
    restarts: int | None = Field(default=None, ge=1, strict=True)
    when: Literal["training", "inference"] = "training"
    collect: Literal["first", "middle", "last"] | Round = "last"
    known_per_class: int | None = Field(default=None, ge=0, strict=True)
    checkpoint_every: int | None = Field(default=None, ge=1, strict=True)
    control: bool | None = Field(default=None, strict=True)
    nodes: tuple[int, ...] | None = Field(default=None, min_length=1)
    reported: Any = None
    everywhere: bool = Field(default=True, strict=True)
    own: JsonObject = Field(default_factory=dict)


class DefenseSettings(BaseModel):
    """One alternative: nothing, one defence, or several applied in order.

    One that is not ``everywhere`` is tried in the cases that name it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[tuple[str, JsonObject], ...] = ()
    everywhere: bool = Field(default=True, strict=True)

    @property
    def name(self) -> str:
        """The catalogue keys joined by ``+``, or ``none``."""
        return "+".join(name for name, _ in self.stack) or "none"


def common_keys(attack: object) -> frozenset[str]:
    """Return the keys that an attack shares with others.

    Args:
        attack: Its name. No other gradients can be forged once a run is over, so an adversary has
            no restarts; a passive attack changes nothing while the run trains; an intruder attacks
            no message of its own choosing.

    Returns:
        Legal keys of its table, beside its own.
    """
    some = _PASSIVE | _ACTIVE | _INTRUDING | _TOLD
    everyones = set(AttackSettings.model_fields) - {"own"} - some
    if attack in intruder_names():
        return frozenset(everyones | _INTRUDING)
    if attack in adversary_names():
        return frozenset(everyones | _ACTIVE)
    return frozenset(everyones | _PASSIVE | (_TOLD if _told(attack) else set()))


def attack_table(table: object) -> object:
    """Return an attack's table with its own settings apart; what is no table is left as it is.

    Args:
        table: As a settings file has it, or a checked one as it was dumped.

    Returns:
        What :class:`AttackSettings` reads.

    Raises:
        ValueError: If a name, a key or a value is not legal.
    """
    if not isinstance(table, Mapping):
        return table
    given = dict(table)
    if isinstance(given.get("own"), Mapping):  # settings that were checked before
        given |= given.pop("own")
    own_fields = _plugin("attacks", "attack", given.get("name")).settings
    common = common_keys(given.get("name"))
    own: JsonObject = {}
    kept: JsonObject = {}
    for key, value in given.items():
        if key not in common and key not in own_fields:
            raise ValueError(unknown(f"key of attack {given['name']}", key, {*common, *own_fields}))
        if key not in common:
            check_value(f"attack {given['name']}", key, value, written=own_fields[key])
        (kept if key in common else own)[key] = value
    if _told(given["name"]):
        kept.setdefault("known_per_class", KNOWN_PER_CLASS)
    return {**kept, "own": own}


def defense_table(table: object) -> object:
    """Return a defence's table as a stack; what is no table is left as it is.

    Args:
        table: As a settings file has it, or a checked one as it was dumped.

    Returns:
        What :class:`DefenseSettings` reads.

    Raises:
        ValueError: If a name, a key or a value is not legal.
    """
    if not isinstance(table, Mapping):
        return table
    common = {key: value for key, value in table.items() if key in _COMMON}
    own = {key: value for key, value in table.items() if key not in _COMMON}
    if "stack" not in own:
        return {**common, "stack": [] if own == {"name": "none"} else [_one(own)]}
    if set(own) != {"stack"}:
        raise ValueError("a [[defense]] with `stack` has no other key")
    if not isinstance(own["stack"], list | tuple):
        raise ValueError(  # noqa: TRY004  pydantic reads ValueErrors alone
            f'stack is {own["stack"]!r}; write a list such as [{{ name = "weight-noise" }}]'
        )
    return {**common, "stack": [_one(each) for each in own["stack"]]}


def _told(attack: object) -> bool:
    """Say whether an attack may know labels."""
    fields = plugin_fields("attacks").get(str(attack))
    return fields is not None and fields.told


def _one(table: object) -> tuple[str, JsonObject]:
    if isinstance(table, list | tuple):  # settings that were checked before
        return table[0], table[1]
    if not isinstance(table, Mapping):
        raise ValueError(f'{table!r} is no defence; write {{ name = "weight-noise" }}')  # noqa: TRY004
    own = {key: value for key, value in table.items() if key != "name"}
    legal = _plugin("defenses", "defence", table.get("name"), "none").settings
    for key, value in own.items():
        if key not in legal:
            raise ValueError(unknown(f"key of defence {table['name']}", key, legal))
        check_value(f"defence {table['name']}", key, value, written=legal[key])
    return str(table["name"]), own


def _plugin(package: str, kind: str, name: object, *also: str) -> PluginFields:
    known = plugin_fields(package)
    if name is None:
        raise ValueError(f"every {kind} needs a name; legal: {', '.join(sorted([*known, *also]))}")
    if name not in known:
        raise ValueError(unknown(kind, str(name), [*known, *also]))
    return known[str(name)]
