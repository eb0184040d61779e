"""An experiment's settings: a TOML file, read strictly and without torch.

Every unknown key, name or value is refused with the nearest legal one. Cells are the product
case x sweep x defence x attack; see :mod:`experiments.cells`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from experiments.plugins import PluginFields, adversary_names, intruder_names, plugin_fields
from experiments.settings_protocol import ProtocolSettings, Strict
from experiments.settings_values import check_value
from leakbed.naming import unknown

JsonObject = dict[str, Any]
SECTIONS = ("data", "model", "protocol")
_PASSIVE, _ACTIVE = {"restarts", "when"}, {"checkpoint_every", "when", "control"}
_INTRUDING = {"nodes", "control"}
_MOST_EXTRA = 1000
_WIDEST = 1024  # pixels a side; all images lie in memory at once


class SettingsError(ValueError):
    """Settings that cannot be run; the message has one line per fault."""


class DataSettings(Strict):
    """Which data, and who owns which rows; see :class:`leakbed.data.recipe.DataRecipe`."""

    name: str = "mnist-5k"
    nodes: int = Field(default=4, ge=1)
    partition: str = "iid"
    alpha: float | None = Field(default=None, gt=0)
    partition_settings: JsonObject = Field(default_factory=dict)
    public: float = Field(default=0.2, ge=0, lt=1)
    public_from: str | None = None
    test: float | None = Field(default=None, ge=0, lt=1)
    size: int | None = Field(default=None, ge=1)
    image_size: int | None = Field(default=None, ge=1, le=_WIDEST)
    channels: Literal[1, 3] | None = None
    download: bool = False


class ModelSettings(Strict):
    """Which network, cut where; see :class:`leakbed.models.Architecture`.

    ``extra_classes`` are outputs beyond those of the data, which no true label uses.
    """

    name: str = "mnistnet"
    cut: int | None = Field(default=None, ge=0)
    upper_cut: int | None = Field(default=None, ge=1)
    activation: str | None = None
    initialisation: Literal["default", "uniform"] = "default"
    extra_classes: int = Field(default=0, ge=0, le=_MOST_EXTRA)


class AttackSettings(BaseModel):
    """One attack: keys every attack has, and its own in ``own``.

    ``restarts`` is for passive attacks, ``checkpoint_every`` and ``control`` are for adversaries,
    see :class:`experiments.cells.Hijacking`; ``nodes`` and ``control`` are for malicious clients,
    see :class:`experiments.cells.Intruding`, whose samples ``targets`` counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    targets: int = Field(default=8, ge=1, strict=True)
    restarts: int | None = Field(default=None, ge=1, strict=True)
    when: Literal["training", "inference"] = "training"
    checkpoint_every: int | None = Field(default=None, ge=1, strict=True)
    control: bool | None = Field(default=None, strict=True)
    nodes: tuple[int, ...] | None = Field(default=None, min_length=1)
    reported: Any = None
    own: JsonObject = Field(default_factory=dict)


class DefenseSettings(BaseModel):
    """One alternative: nothing, one defence, or several applied in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[tuple[str, JsonObject], ...] = ()

    @property
    def name(self) -> str:
        """The catalogue keys joined by ``+``, or ``none``."""
        return "+".join(name for name, _ in self.stack) or "none"


class Settings(Strict):
    """A whole experiment, as its file has it.

    Attributes:
        name: Of the experiment.
        seed: From which every stream of a cell is derived; may be swept.
        demo: Whether the budget is cut for a demonstration; every card says so.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        grid: ``"local"`` or ``"ray"``; under ``flwr run`` Flower's own.
        workers: Processes of the Ray grid; None for one per core.
        gpus_per_worker: Share of a GPU each of them takes.
        ray_address: Of a Ray cluster to join, ``"auto"`` for the one this machine belongs to; None
            starts Ray on this machine alone.
        keep_rounds: Which rounds a trace keeps: the ``"last"``, which is attacked, or ``"all"``.
        data: Defaults of every cell's data.
        model: Likewise.
        protocol: Likewise.
        case: Named partial overrides, flattened to dotted keys.
        attack: The attacks.
        defense: The alternatives.
        sweep: Dotted key to the values it takes.
    """

    model_config = ConfigDict(strict=False)  # a TOML list stands for a tuple

    name: str
    seed: int = Field(default=0, ge=0, strict=True)
    demo: bool = False
    device: str = "auto"
    grid: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    ray_address: str | None = None
    keep_rounds: Literal["last", "all"] = "last"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    protocol: ProtocolSettings = ProtocolSettings()
    case: tuple[JsonObject, ...] = ()
    attack: tuple[AttackSettings, ...] = Field(min_length=1)
    defense: tuple[DefenseSettings, ...] = (DefenseSettings(),)
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip(". ") or set(name) & set("/\\\0"):
            raise ValueError(f"{name!r} cannot name a results folder; use letters, digits and -")
        return name

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, given: object) -> object:
        """Turn the file's attack and defence tables into what they mean."""
        if not isinstance(given, Mapping):
            return given
        tables = dict(given)
        if isinstance(attacks := tables.get("attack"), Sequence):
            tables["attack"] = [_attack(table) for table in attacks]
        if isinstance(defenses := tables.get("defense"), Sequence):
            tables["defense"] = [_defense(table) for table in defenses]
        if isinstance(cases := tables.get("case"), Sequence):
            tables["case"] = [_flat(table) for table in cases]
        return tables

    @model_validator(mode="after")
    def _legal_overrides(self) -> "Settings":
        """Check every dotted key of every case and sweep, and each of its values."""
        for case in self.case:
            if not isinstance(case.get("name"), str):
                raise ValueError(f"every [[case]] needs a name, got {case}")  # noqa: TRY004
            for key, value in case.items():
                if key != "name":
                    _check_dotted(f"case {case['name']!r}", key, value)
        for key, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep {key!r} has no values")
            for value in values:
                _check_dotted("sweep", key, value)
        return self


def common_keys(attack: object) -> frozenset[str]:
    """Return the keys that an attack shares with others.

    Args:
        attack: Its name. No other gradients can be forged once a run is over, so an adversary has
            no restarts; a passive attack changes nothing while the run trains; an intruder attacks
            no message of its own choosing.

    Returns:
        Legal keys of its table, beside its own.
    """
    everyones = set(AttackSettings.model_fields) - {"own"} - _PASSIVE - _ACTIVE - _INTRUDING
    if attack in intruder_names():
        return frozenset(everyones | _INTRUDING)
    return frozenset(everyones | (_ACTIVE if attack in adversary_names() else _PASSIVE))


def _attack(table: object) -> object:
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
    return {**kept, "own": own}


def _defense(table: object) -> object:
    if not isinstance(table, Mapping):
        return table
    if "stack" in table:
        if set(table) != {"stack"}:
            raise ValueError("a [[defense]] with `stack` has no other key")
        if not isinstance(table["stack"], list | tuple):
            raise ValueError(
                f'stack is {table["stack"]!r}; write a list such as [{{ name = "weight-noise" }}]'
            )
        return {"stack": [_one(each) for each in table["stack"]]}
    return {"stack": []} if dict(table) == {"name": "none"} else {"stack": [_one(table)]}


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


def _flat(table: object) -> object:
    """Return a case with nested tables as dotted keys."""
    if not isinstance(table, Mapping):
        return table
    flat: JsonObject = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and key in SECTIONS:
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


class _Seed(Strict):
    seed: int = Field(default=0, ge=0)


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "protocol": ProtocolSettings,
}


def _check_dotted(place: str, key: str, value: object) -> None:
    """Refuse a key that cannot be overridden, or a value that its section refuses."""
    section, _, name = key.partition(".")
    if section in {"attack", "defense"}:
        raise ValueError(
            f"{place}: {key!r} cannot be overridden; write one [[{section}]] for each value"
        )
    legal = [
        "seed",
        *(f"{s}.{field}" for s, kind in _SECTIONS.items() for field in kind.model_fields),
    ]
    if key not in legal:
        raise ValueError(unknown("dotted key", key, legal))
    try:
        _SECTIONS.get(section, _Seed).model_validate({name or key: value})
    except ValidationError as error:
        wanted = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{place}: {key}: {wanted} (got {value!r})") from None
