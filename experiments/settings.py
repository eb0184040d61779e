"""An experiment's settings: a TOML file, read strictly and without torch.

Every unknown key, name or value is refused with the nearest legal one. Cells are the product
case x sweep x defence x attack; see :mod:`experiments.cells`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from experiments.plugins import PluginFields, plugin_fields, protocol_names
from leakbed.naming import unknown

JsonObject = dict[str, Any]
SECTIONS = ("data", "model", "protocol")
_MOST = 1_000_000  # steps or rounds; the order of batches is laid out before training starts


class SettingsError(ValueError):
    """Settings that cannot be run; the message has one line per fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: object) -> object:
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(unknown("key", str(key), cls.model_fields))
        return given


class DataSettings(_Strict):
    """Which data, and who owns which rows; see :class:`leakbed.data.recipe.DataRecipe`."""

    name: str = "mnist-5k"
    nodes: int = Field(default=4, ge=1)
    partition: str = "iid"
    alpha: float | None = Field(default=None, gt=0)
    partition_settings: JsonObject = Field(default_factory=dict)
    public: float = Field(default=0.2, ge=0, lt=1)
    test: float | None = Field(default=None, ge=0, lt=1)
    size: int | None = Field(default=None, ge=1)
    image_size: int | None = Field(default=None, ge=1)
    download: bool = False


class ModelSettings(_Strict):
    """Which network, cut where; see :class:`leakbed.models.Architecture`."""

    name: str = "mnistnet"
    cut: int | None = Field(default=None, ge=0)
    activation: str | None = None
    initialisation: Literal["default", "uniform"] = "default"


class ProtocolSettings(_Strict):
    """How the nodes train.

    ``local_steps`` None is one pass over a node's data per round; ``timeout`` is how many seconds a
    node may take for one message before the run stops.
    """

    name: str = "fedavg"
    rounds: int = Field(default=1, ge=1, le=_MOST)
    batch_size: int = Field(default=32, ge=1)
    local_steps: int | None = Field(default=None, ge=1, le=_MOST)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    fraction: float = Field(default=1.0, gt=0, le=1)
    labels: Literal["shared", "server"] = "shared"
    bottoms: Literal["sealed", "relayed"] = "sealed"
    timeout: float = Field(default=3600.0, gt=0)

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name not in protocol_names():
            raise ValueError(unknown("protocol", name, protocol_names()))
        return name


class AttackSettings(BaseModel):
    """One attack: keys every attack has, and its own in ``own``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    targets: int = Field(default=8, ge=1)
    restarts: int | None = Field(default=None, ge=1)
    when: Literal["training", "inference"] = "training"
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


class Settings(_Strict):
    """A whole experiment, as its file has it.

    Attributes:
        name: Of the experiment.
        seed: From which every stream of a cell is derived; may be swept.
        demo: Whether the budget is cut for a demonstration; every card says so.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        grid: ``"local"`` or ``"ray"``; under ``flwr run`` Flower's own.
        workers: Processes of the Ray grid; None for one per core.
        gpus_per_worker: Share of a GPU each of them takes.
        data: Defaults of every cell's data.
        model: Likewise.
        protocol: Likewise.
        case: Named partial overrides, flattened to dotted keys.
        attack: The attacks.
        defense: The alternatives.
        sweep: Dotted key to the values it takes.
    """

    name: str
    seed: int = Field(default=0, ge=0)
    demo: bool = False
    device: str = "auto"
    grid: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    protocol: ProtocolSettings = ProtocolSettings()
    case: tuple[JsonObject, ...] = ()
    attack: tuple[AttackSettings, ...] = Field(min_length=1)
    defense: tuple[DefenseSettings, ...] = (DefenseSettings(),)
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

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
        """Check every dotted key of every case and sweep, and the protocol's name."""
        for key in [*self.sweep, *(key for case in self.case for key in case if key != "name")]:
            _check_dotted(key)
        for case in self.case:
            if not isinstance(case.get("name"), str):
                raise ValueError(f"every [[case]] needs a name, got {case}")  # noqa: TRY004
        for key, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep {key!r} has no values")
        return self


def _attack(table: object) -> object:
    if not isinstance(table, Mapping) or isinstance(table, AttackSettings) or "own" in table:
        return table
    common = set(AttackSettings.model_fields) - {"own"}
    own_fields = _plugin("attacks", "attack", table.get("name")).settings
    own: JsonObject = {}
    kept: JsonObject = {}
    for key, value in table.items():
        if key not in common and key not in own_fields:
            raise ValueError(unknown(f"key of attack {table['name']}", key, {*common, *own_fields}))
        (kept if key in common else own)[key] = value
    return {**kept, "own": own}


def _defense(table: object) -> object:
    if not isinstance(table, Mapping):
        return table
    if "stack" in table:
        if set(table) != {"stack"}:
            raise ValueError("a [[defense]] with `stack` has no other key")
        return {
            "stack": [
                each if isinstance(each, list | tuple) else _one(each) for each in table["stack"]
            ]
        }
    return {"stack": []} if dict(table) == {"name": "none"} else {"stack": [_one(table)]}


def _one(table: Mapping[str, Any]) -> tuple[str, JsonObject]:
    own = {key: value for key, value in table.items() if key != "name"}
    legal = _plugin("defenses", "defence", table.get("name"), "none").settings
    for key in own:
        if key not in legal:
            raise ValueError(unknown(f"key of defence {table['name']}", key, legal))
    return str(table["name"]), own


def _plugin(package: str, kind: str, name: object, *also: str) -> PluginFields:
    known = plugin_fields(package)
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


def _check_dotted(key: str) -> None:
    models: dict[str, type[BaseModel]] = {
        "data": DataSettings,
        "model": ModelSettings,
        "protocol": ProtocolSettings,
    }
    legal = [
        "seed",
        *(f"{s}.{field}" for s, model in models.items() for field in model.model_fields),
    ]
    if key not in legal:
        raise ValueError(unknown("dotted key", key, legal))
