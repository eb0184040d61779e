"""An experiment's settings: a TOML file, read strictly and without torch.

Every unknown key, name or value is refused with the nearest legal one. Cells are the product
case x sweep x defence x attack; see :mod:`experiments.settings.cells`.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from experiments.settings.plugins import (
    AttackSettings,
    DefenseSettings,
    JsonObject,
    attack_table,
    common_keys,
    defense_table,
    import_path,
    own_fields,
    strengths,
)
from experiments.settings.protocol import ProtocolSettings, Strict
from experiments.settings.values import checked_value
from leakbed.lookup import unknown_name
from leakbed.plugins import is_own, own_class

__all__ = [
    "CHOICES",
    "SECTIONS",
    "AttackSettings",
    "CeilingSettings",
    "DataSettings",
    "DefenseSettings",
    "JsonObject",
    "ModelSettings",
    "Settings",
    "SettingsError",
    "common_keys",
]

CHOICES = {"attacks": "attack", "defenses": "defense"}
"""Keys of a case that choose among the experiment's tables of a kind."""
_MOST_EXTRA = 1000
_WIDEST = 1024  # pixels a side; all images lie in memory at once


class SettingsError(ValueError):
    """Settings that cannot be run; the message has one line per fault."""


def _plain(section: str, settings: JsonObject) -> JsonObject:
    """Refuse a table within the settings of one's own, which are passed on as keywords."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            raise ValueError(  # noqa: TRY004  pydantic reads ValueErrors alone
                f"{section}.settings: {key} = {value!r} is a table; write one value or a list"
            )
    return settings


class DataSettings(Strict):
    """Which data, and who owns which rows; see :class:`leakbed.data.config.DataConfig`.

    Attributes:
        name: A data set of the catalogue, ``image-folder:PATH``, or ``package.module:function``.
        nodes: Number of data holders.
        partition: Who owns which rows: ``iid`` or another partition of the catalogue.
        alpha: Of the Dirichlet partition: the lower, the more uneven.
        partition_settings: Further settings of the partition.
        public: Share of the rows that the adversary owns.
        public_from: Data set of which it owns as many rows instead.
        test: Share of the rows held out; by default those that the data set names.
        size: Keep only so many rows.
        image_size: Resize images to this side.
        channels: 1 makes images grey, 3 coloured.
        download: Whether a missing set may be downloaded.
        canaries: How many private rows get a label drawn whatever the image, for label games.
        settings: Further keywords of one's own function.
    """

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
    canaries: int = Field(default=0, ge=0)
    settings: JsonObject = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _plain_settings(cls, settings: JsonObject) -> JsonObject:
        return _plain("data", settings)

    @field_validator("name", "public_from")
    @classmethod
    def _by_path(cls, name: str | None) -> str | None:
        """Return the import path behind the short name that an installed package gave to data."""
        return None if name is None else import_path("data", name)


class ModelSettings(Strict):
    """Which network, cut where; see :class:`leakbed.models.Architecture`.

    Attributes:
        name: A network of the catalogue, or ``package.module:Class``.
        cut: The last layer of the bottom: its index, from 0, or its path in the network, such as
            ``"features.3"``.
        upper_cut: Index of the last layer of the middle, where the node holds the head too.
        activation: Replaces the published activation everywhere.
        initialisation: How fresh weights are drawn.
        linear_top: Whether activations above the cut are left out.
        extra_classes: Outputs beyond those of the data, which no true label uses.
        settings: Further keywords of one's own network.
    """

    name: str = "mnistnet"
    cut: Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)] | None = None
    upper_cut: int | None = Field(default=None, ge=1)
    activation: str | None = None
    initialisation: Literal["default", "uniform"] = "default"
    linear_top: bool = False
    extra_classes: int = Field(default=0, ge=0, le=_MOST_EXTRA)
    settings: JsonObject = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _plain_settings(cls, settings: JsonObject) -> JsonObject:
        return _plain("model", settings)

    @field_validator("name")
    @classmethod
    def _by_path(cls, name: str) -> str:
        """Return the import path behind the short name that an installed package gave a model."""
        return import_path("models", name)


SECTIONS: Mapping[str, type[BaseModel]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "protocol": ProtocolSettings,
}
"""The tables of which every cell has its own."""


class CeilingSettings(Strict):
    """The ceiling beside every card, computed once for each training run and kind of message.

    Attributes:
        candidates: Rows among which a message's row is sought.
        messages: How many messages it is computed for.
        draws: Of the noise, for each candidate.
    """

    candidates: int = Field(default=1000, ge=2)
    messages: int = Field(default=8, ge=1)
    draws: int = Field(default=4, ge=1)


class MetricSettings(Strict):
    """One metric of one's own, with its settings."""

    name: str
    own: JsonObject = Field(default_factory=dict)


class Settings(Strict):
    """A whole experiment, as its file has it.

    Attributes:
        name: Of the experiment.
        seed: From which every stream of a cell is derived; may be swept.
        demo: Whether the budget is cut for a demonstration; every card says so.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. ``"auto"`` is what the process
            that is started has; processes of Ray's are then held to it.
        grid: ``"local"`` or ``"ray"``; under ``flwr run`` Flower's own.
        workers: Processes of the Ray grid; left out, as many as fit, one a CPU at most.
        gpus_per_worker: Share of a GPU each of them takes, or each training run that is shared out.
            Left out, equal shares of the GPUs that Ray counts; of workers' shares there is one more
            on each, which is left to this process.
        ray_address: Of a Ray cluster to join, ``"auto"`` for the one this machine belongs to. With
            the local grid its machines share the training runs, as many at once as there are CPUs;
            with the Ray grid they hold the nodes, and training runs follow one another here.
        jobs: Training runs, each with its attacks, that Ray's processes on this machine do at
            once, with the same numbers; of 1, Ray is not even imported. A cluster at
            ``ray_address`` has its own count. Only of the local grid: a training run on a process
            of Ray's whose nodes need more of them could wait for ever.
        keep_rounds: Which rounds a trace keeps: the ``"last"``, which is attacked, or ``"all"``.
        keep_runs: Whether training runs stay when their cells are done. Of many cells they are
            gigabytes; without them, a cell with other attack settings trains again.
        on_error: What follows where the code of an attack or a defence breaks, or a cell has ended
            two processes that training runs are shared among: a card of status ``failed`` and the
            next cell (``"card"``), or the end of the run (``"stop"``).
        data: Defaults of every cell's data.
        model: Likewise.
        protocol: Likewise.
        case: Named partial overrides, flattened to dotted keys; ``attacks`` and ``defenses`` list
            by name the only ones tried in it.
        attack: The attacks.
        defense: The alternatives.
        metric: Metrics of one's own, by which guessed images are scored besides.
        sweep: Dotted key to the values it takes.
        ceiling: What to compute beside the cards, the success of the best possible guess; None for
            nothing.
    """

    model_config = ConfigDict(strict=False)  # a TOML list stands for a tuple

    name: str
    seed: int = Field(default=0, ge=0, strict=True)
    demo: bool = False
    device: str = "auto"
    grid: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0)
    ray_address: str | None = None
    jobs: int = Field(default=1, ge=1, strict=True)
    keep_rounds: Literal["last", "all"] = "last"
    keep_runs: bool = True
    on_error: Literal["card", "stop"] = "card"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    protocol: ProtocolSettings = Field(default_factory=ProtocolSettings)
    case: tuple[JsonObject, ...] = ()
    attack: tuple[AttackSettings, ...] = Field(min_length=1)
    defense: tuple[DefenseSettings, ...] = (DefenseSettings(),)
    metric: tuple[MetricSettings, ...] = ()
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    ceiling: CeilingSettings | None = None

    @model_validator(mode="after")
    def _shares_runs_or_nodes(self) -> "Settings":
        if self.grid == "ray" and self.jobs > 1:
            raise ValueError(
                f"jobs = {self.jobs} shares training runs among Ray's processes, and grid = 'ray' "
                "the nodes of each run: one of them alone; set jobs = 1, or grid = 'local'"
            )
        return self

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
            tables["attack"] = [
                attack_table(one) for table in attacks for one in strengths("attacks", table)
            ]
        if isinstance(defenses := tables.get("defense"), Sequence):
            tables["defense"] = [
                defense_table(one) for table in defenses for one in strengths("defenses", table)
            ]
        if isinstance(metrics := tables.get("metric"), Sequence):
            tables["metric"] = [_metric_table(table) for table in metrics]
        if isinstance(cases := tables.get("case"), Sequence):
            tables["case"] = [_flat(table) for table in cases]
        return tables

    @field_validator("metric")
    @classmethod
    def _apart(cls, metrics: tuple[MetricSettings, ...]) -> tuple[MetricSettings, ...]:
        """Refuse two metrics under one name, of whose scores a card would keep the last."""
        names = [own_class(each.name, "metric").name for each in metrics]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two [[metric]] are called {twice[0]!r}, and a card has one score of a name; "
                "write a second class with another `name`"
            )
        return metrics

    @model_validator(mode="after")
    def _legal_devices(self) -> "Settings":
        """Refuse devices that Ray's workers cannot have."""
        if self.grid != "ray" or not self.device.startswith("cuda"):
            return self
        if self.device != "cuda":
            raise ValueError(
                f"device = {self.device!r}: on grid = 'ray' a worker sees the GPU that Ray gives "
                "it, whichever that is; set device = 'cuda' or 'auto'"
            )
        if self.gpus_per_worker == 0:
            raise ValueError(
                "gpus_per_worker = 0 leaves Ray's workers no GPU for device = 'cuda'; leave "
                "gpus_per_worker out for equal shares, or set device = 'cpu' or 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _legal_overrides(self) -> "Settings":
        """Check every dotted key of every case and sweep, and each of its values."""
        for case in self.case:
            self._check_case(case)
        for key, table in CHOICES.items():
            _check_reached(key, getattr(self, table), self.case)
        for key, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep {key!r} has no values")
            for value in values:
                _check_dotted("sweep", key, value)
        self._check_protocols()
        return self

    def _check_protocols(self) -> None:
        """Check what cases and swept values make of ``[protocol]``, whose keys its name decides."""
        swept = [key for key in self.sweep if key.startswith("protocol.")]
        for case in self.case or ({},):
            for values in product(*(self.sweep[key] for key in swept)):
                found = {**case, **dict(zip(swept, values, strict=True))}
                try:
                    self.protocol.replaced(part_of("protocol", found))
                except ValidationError as error:
                    fault = error.errors()[0]
                    key = ".".join(["protocol", *map(str, fault["loc"])])
                    place = "sweep" if key in swept or not case else f"case {case['name']!r}"
                    wanted = str(fault["msg"]).removeprefix("Value error, ")
                    given = f" (got {fault['input']!r})" if fault["loc"] else ""
                    raise ValueError(f"{place}: {key}: {wanted}{given}") from None

    def _check_case(self, case: JsonObject) -> None:
        if not isinstance(case.get("name"), str):
            raise ValueError(f"every [[case]] needs a name, got {case}")  # noqa: TRY004
        place = f"case {case['name']!r}"
        for key, value in case.items():
            if key in CHOICES:
                _check_chosen(place, key, value, offered=getattr(self, CHOICES[key]))
            elif key != "name":
                _check_dotted(place, key, value)


def _metric_table(table: object) -> object:
    """Return a metric's table with its settings apart; what is no table is left as it is.

    Args:
        table: As a settings file has it, or a checked one as it was dumped.

    Returns:
        What :class:`MetricSettings` reads.

    Raises:
        ValueError: If a name, a key or a value is not legal.
    """
    if not isinstance(table, Mapping):
        return table
    given = dict(table)
    if isinstance(given.get("own"), Mapping):  # settings that were checked before
        given |= given.pop("own")
    name = given.pop("name", None)
    name = import_path("metrics", name) if isinstance(name, str) else name
    if not isinstance(name, str) or not is_own(name):
        raise ValueError(
            f"metric {name!r}: every score has the oracle's own metrics anyhow; a [[metric]] names "
            "one of your own, 'package.module:Class'"
        )
    legal = own_fields("metrics", name).settings
    for key, value in given.items():
        if key not in legal:
            raise ValueError(unknown_name(f"key of metric {name}", key, legal))
        given[key] = checked_value(f"metric {name}", key, value, written=legal[key])
    return {"name": name, "own": given}


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


def _check_reached(
    key: str,
    offered: Sequence[AttackSettings | DefenseSettings],
    cases: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse what would run nowhere, and a case without anything to run."""
    named = {name for case in cases for name in case.get(key, ())}
    for each in offered:
        if not each.everywhere and each.choice not in named:
            raise ValueError(
                f"{CHOICES[key]} {each.choice!r} has everywhere = false and no [[case]] names it "
                f"in its {key}, so it would never run"
            )
    if not any(each.everywhere for each in offered):
        idle = [case["name"] for case in cases if key not in case] if cases else ["the experiment"]
        if idle:
            raise ValueError(f"{idle[0]} has no {CHOICES[key]}: none is tried everywhere")


class _Seed(Strict):
    seed: int = Field(default=0, ge=0)


def part_of(section: str, overrides: Mapping[str, Any]) -> JsonObject:
    """Return what dotted keys say of a section, by its own keys."""
    return {
        name: value
        for key, value in overrides.items()
        for place, dot, name in [key.partition(".")]
        if dot and place == section
    }


def _check_chosen(
    place: str, key: str, value: object, *, offered: Sequence[AttackSettings | DefenseSettings]
) -> None:
    """Refuse a choice that is no list, or names what the experiment does not have."""
    names = sorted({each.choice for each in offered})
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{place}: {key} is {value!r}; write a list of: {', '.join(names)}")
    for name in value:
        if name not in names:
            message = unknown_name(CHOICES[key], str(name), names)
            raise ValueError(f"{place}: {key}: {message}; give it a [[{CHOICES[key]}]] table")


def _check_dotted(place: str, key: str, value: object) -> None:
    """Refuse a key that cannot be overridden, or a value that its section refuses."""
    section, dot, name = key.partition(".")
    if section == "protocol" and dot:
        return  # which of its keys are legal, and with which values, depends on its name
    if section in {"attack", "defense"}:
        raise ValueError(
            f"{place}: {key!r} cannot be overridden; write one [[{section}]] for each value"
        )
    legal = [
        "seed",
        *(f"{s}.{field}" for s, kind in SECTIONS.items() for field in kind.model_fields),
    ]
    if key not in legal:
        raise ValueError(unknown_name("dotted key", key, legal))
    try:
        SECTIONS.get(section, _Seed).model_validate({name or key: value})
    except ValidationError as error:
        wanted = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{place}: {key}: {wanted} (got {value!r})") from None
