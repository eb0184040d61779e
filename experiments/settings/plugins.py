"""The tables of a settings file that name a plug-in: attacks, defences and metrics, with settings.

Names and settings of the catalogue's plug-ins are those of :mod:`experiments.settings.catalogues`.
A class of one's own, named by import path, is imported: it may lie anywhere and be written in any
way, and the types of its fields are checked as they are.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from itertools import product
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from experiments.settings.catalogues import (
    PluginFields,
    adversary_names,
    intruder_names,
    metric_names,
    names_known,
    plugin_fields,
    protocol_choices,
)
from experiments.settings.values import checked_value, is_known, is_scalar
from leakbed.contracts import Knowledge, ThreatModel
from leakbed.lookup import unknown_name
from leakbed.plugins import (
    Contract,
    Group,
    PluginError,
    installed,
    is_own,
    offering,
    own_class,
    role_of,
    unknown_plugin,
)

JsonObject = dict[str, Any]
_Listed = Literal["attacks", "defenses"]
Package = Literal["attacks", "defenses", "metrics"]
_CONTRACTS: Mapping[Package, Contract] = {
    "attacks": "attack",
    "defenses": "defence",
    "metrics": "metric",
}


@cache
def own_fields(package: Package, path: str) -> PluginFields:
    """Return what a settings file may say of a class of one's own, which is imported for it.

    What cannot be imported is an :class:`~leakbed.lookup.ImportPathError`.

    Args:
        package: Where the catalogue has its like.
        path: ``package.module:Class``.

    Returns:
        Its settings.

    Raises:
        PluginError: It breaks the contract, has the name of a catalogue's, or is a metric whose
            name stands for something else in results.
    """
    kind = own_class(path, _CONTRACTS[package])
    if kind.name in _listed(package):
        raise PluginError(
            f"{path} has the name {kind.name!r}, which is the catalogue's own; give it another"
        )
    if package == "metrics" and is_taken(kind.name):
        raise PluginError(
            f"{path} has the name {kind.name!r}, under which a card or `leakbed results` may have "
            "something else; give it one without a dot that does not end in "
            f"{', '.join(_ENDINGS)} and is none of {', '.join(sorted(_COLUMNS))}"
        )
    return PluginFields(settings=_types(kind), told=_may_know(kind))


_NAMES = {"case", "protocol", "data", "model", "cut", "nodes", "attack", "defense"}
_RUNS = {"seed", "seeds", "attack_seed", "status", "why", "demo", "control", "doubts"}
_SETTINGS = {"device", "keep_rounds", "metric"}
_SCORES = {"targets", "rows", "candidates", "failures", "clipped", "judge", "turns"}
_BOUNDS = {"ceiling", "canary_label_ceiling", "test_accuracy", "honest_test_accuracy"}
_TIMES = {"seconds", "attack_seconds"}
_SIZES = {"bytes_up", "bytes_down", "peak_memory", "peak_gpu_memory"}
_COLUMNS = _NAMES | _RUNS | _SETTINGS | _SCORES | _BOUNDS | _TIMES | _SIZES
_ENDINGS = ("_low", "_high", "_baseline", "_baseline_name", "_stderr", "_skill")


def is_taken(name: str) -> bool:
    """Say whether a card's scores or a column of `leakbed results` may have a name.

    Args:
        name: Of a metric of one's own; the oracle's metrics are in no question here.

    Returns:
        Whether the metric would overwrite what is there, or be overwritten. Names with a dot are
        those of settings.
    """
    return name in _COLUMNS or "." in name or name.endswith(_ENDINGS)


def _may_know(kind: type[Any]) -> bool:
    """Say whether a class names known labels: in its module, or, of a cell, in its own threat."""
    threat = getattr(kind(), "threat", None)
    if isinstance(threat, ThreatModel) and Knowledge.KNOWN_LABELS in threat.needs:
        return True
    module = inspect.getmodule(kind)
    try:
        return module is not None and names_known(inspect.getsource(module))
    except (OSError, TypeError):  # of a notebook's cell, or of a program read from a pipe
        return False


def import_path(group: Group, name: str) -> str:
    """Return the import path behind the short name of what an installed package offers.

    Args:
        group: What is named.
        name: As a settings file has it.

    Returns:
        The path; any other name as it is.

    Raises:
        PluginError: An installed package offers a name that is the catalogue's, or two offer it.
    """
    if is_own(name) or name not in (offered := installed(group)):
        return name
    found = offered[name]
    if name in _listed(group):
        source = found.dist.name if found.dist else "an installed package"
        raise PluginError(
            f"{source} offers {name!r}, which is the catalogue's own; give it another name in its "
            "entry points, or uninstall it"
        )
    if len(packages := offering(group, name)) > 1:
        raise PluginError(
            f"{' and '.join(packages)} both offer {name!r}; uninstall one, or write the import "
            f"path of what you mean, such as {found.value!r}"
        )
    return found.value


def _listed(group: Group) -> Collection[str]:
    """Return the catalogue's own keys; those of models and data are read by importing them."""
    if group == "protocols":
        return protocol_choices()
    if group == "models":
        return frozenset(vars(import_module("leakbed.models"))["MODELS"])
    if group == "data":
        return frozenset(vars(import_module("leakbed.data"))["DATASETS"])
    if group == "metrics":
        return metric_names()
    return plugin_fields(group)


def is_adversary(name: object) -> bool:
    """Say whether an attack rewrites messages at the server while a run trains."""
    return name in adversary_names() or _plays(name, "adversary")


def is_intruder(name: object) -> bool:
    """Say whether an attack is a malicious client."""
    return name in intruder_names() or _plays(name, "intruder")


def _plays(name: object, role: str) -> bool:
    return isinstance(name, str) and is_own(name) and role_of(own_class(name, "attack")) == role


def _types(kind: type[Any]) -> dict[str, object]:
    """Return the type of each field of an imported dataclass: its text if known, else itself."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # it names what it imports for type checkers alone
        hints = {}
    found: dict[str, object] = {}
    for each in fields(kind):
        written = each.type if isinstance(each.type, str) else _text(each.type)
        found[each.name] = written if is_known(written) else hints.get(each.name, written)
    return found


def _text(kind: object) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


Round = Annotated[int, Field(ge=1, strict=True)]
_PASSIVE = {"restarts", "when", "collect", "live", "grants"}
_ACTIVE = {"checkpoint_every", "when", "control"}
_INTRUDING = {"nodes", "control"}
_TOLD, KNOWN_PER_CLASS = {"known_per_class"}, 1
_SOME = _PASSIVE | _ACTIVE | _INTRUDING | _TOLD
_COMMON = {"everywhere", "called"}


class ReservedSettingError(ValueError):
    """A plug-in has a setting that would never get its value, since a common key takes it."""


Rows = Literal["private", "public", "test", "elsewhere"]


class TunedOn(BaseModel):
    """The runs that an attack's settings were chosen on.

    ``seeds`` are those of the runs, ``rows`` the part of their data that scores were looked at:
    ``private``, ``test``, the adversary's own ``public`` rows, or images ``elsewhere``, which are
    not among the experiment's data and need no seed. Another seed draws the parts of one data
    set anew, so that single images may be in both draws.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    rows: Rows

    @model_validator(mode="after")
    def _needs_seeds(self) -> "TunedOn":
        if not self.seeds and self.rows != "elsewhere":
            raise ValueError(f"{self.rows} rows are those of a seed; name the seeds")
        return self


class AttackSettings(BaseModel):
    """One attack: keys every attack has, and its own in ``own``.

    Attributes:
        name: A key of the catalogue, or ``package.module:Class``.
        targets: How many messages it attacks; of a malicious client, how many samples it is asked
            for.
        restarts: Of passive attacks: how often it tries, and keeps the best by its own objective.
        when: Whether it reads messages of training or of the evaluation.
        collect: Of passive attacks: the round whose messages are attacked.
        known_per_class: Of attacks that know a few true labels: the first so many targets of each
            class.
        live: Of passive attacks that can: whether it learns beside the training, from every batch
            as it is sent, and not from a round that is over.
        checkpoint_every: Of adversaries: gradients between two measures of what it can decode.
        control: Of adversaries and malicious clients: whether a control run stands beside it.
        nodes: Of malicious clients: the partitions that are one.
        grants: Of passive attacks: what it is told of its own kinds of knowledge, by name, with
            their settings; a list of names takes the defaults.
        tuned_on: What its settings were chosen on: nothing for this experiment (``"default"``: the
            catalogue's, but for those that the table has), its source (``"published"``), or runs on
            other targets. It changes no number, and the card says it.
        reported: The source's own figure.
        everywhere: Whether it is tried in every case, or only in those that name it.
        called: By what a case names it, in place of its name.
        own: Its own settings, which a settings file writes beside the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    targets: int = Field(default=8, ge=1, strict=True)
    restarts: int | None = Field(default=None, ge=1, strict=True)
    when: Literal["training", "inference"] = "training"
    collect: Literal["first", "middle", "last"] | Round = "last"
    known_per_class: int | None = Field(default=None, ge=0, strict=True)
    live: bool = Field(default=False, strict=True)
    checkpoint_every: int | None = Field(default=None, ge=1, strict=True)
    control: bool | None = Field(default=None, strict=True)
    nodes: tuple[int, ...] | None = Field(default=None, min_length=1)
    grants: dict[str, JsonObject] = Field(default_factory=dict)
    tuned_on: Literal["default", "published"] | TunedOn = "default"
    reported: Any = None
    everywhere: bool = Field(default=True, strict=True)
    called: str | None = None
    own: JsonObject = Field(default_factory=dict)

    @field_validator("tuned_on", mode="before")
    @classmethod
    def _says_what_on(cls, given: object) -> object:
        """Refuse what names neither a source nor runs, in one line."""
        if given in ("default", "published") or isinstance(given, TunedOn):
            return given
        try:
            return TunedOn.model_validate(given)
        except ValidationError:
            raise ValueError(
                f'{given!r} says nothing; write "default", "published", or the runs that the '
                'settings were chosen on, such as { seeds = [100, 101], rows = "private" }, '
                f"where rows is one of {', '.join(get_args(Rows))}"
            ) from None

    @field_validator("grants", mode="before")
    @classmethod
    def _by_name(cls, given: object) -> object:
        """Read a list of names as a table with every default."""
        if isinstance(given, list | tuple) and all(isinstance(each, str) for each in given):
            return {name: {} for name in given}
        return given

    @model_validator(mode="after")
    def _has_one_training(self) -> "AttackSettings":
        """Refuse of a live attack what needs a round that is over."""
        if not self.live:
            return self
        for key, value, only in (
            ("restarts", self.restarts, None),
            ("collect", self.collect, "last"),
        ):
            if value != only:
                raise ValueError(
                    f"{key} = {value!r} beside live = true: a live attack learns from the one "
                    f"training there is, and reads its last round; leave {key} out, or live"
                )
        return self

    @property
    def choice(self) -> str:
        """What a case chooses it by."""
        return self.called or self.name


def round_number(collect: str | int, *, last: int) -> int:
    """Return which round an attack reads.

    Args:
        collect: ``"first"``, ``"middle"``, ``"last"`` or the round's number.
        last: The last round's number.

    Returns:
        Its number; of an even number of rounds the middle is the earlier one.
    """
    named = {"first": 1, "middle": (last + 1) // 2, "last": last}
    return named[collect] if isinstance(collect, str) else collect


class DefenseSettings(BaseModel):
    """One alternative: nothing, one defence, or several applied in order.

    Attributes:
        stack: Name and settings of each.
        everywhere: Whether it is tried in every case, or only in those that name it.
        called: By what a case names it, in place of its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: tuple[tuple[str, JsonObject], ...] = ()
    everywhere: bool = Field(default=True, strict=True)
    called: str | None = None

    @property
    def choice(self) -> str:
        """What a case chooses it by."""
        return self.called or self.name

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
    everyones = set(AttackSettings.model_fields) - {"own"} - _SOME
    if is_intruder(attack):
        return frozenset(everyones | _INTRUDING)
    if is_adversary(attack):
        return frozenset(everyones | _ACTIVE)
    return frozenset(everyones | _PASSIVE | (_TOLD if _told(attack) else set()))


def refuse_reserved(kind: str, name: str) -> None:
    """Refuse a plug-in with a setting that would never get its value, since a common key takes it.

    Args:
        kind: ``"attack"`` or ``"defence"``.
        name: Its catalogue key.

    Raises:
        ReservedSettingError: If it has one.
    """
    if kind == "attack":
        own = _plugin("attacks", kind, name).settings
        # An attack that chooses among its tries has restarts of its own, and is told their number.
        reserved = {*common_keys(name), "own"} - {"restarts"}
    else:
        own, reserved = _plugin("defenses", kind, name).settings, {*_COMMON, "name", "stack"}
    for setting in own:
        if setting in reserved:
            raise ReservedSettingError(
                f"{name} has a setting `{setting}`, which is a key of every {kind}"
                f"{' of its kind' if setting in _SOME else ''}; call it otherwise"
            )


def strengths(package: Package, table: object) -> list[object]:
    """Return a table for every combination of the values that lists give to scalar settings.

    ``share = [0.1, 0.5]`` of a defence whose share is a number stands for two defences.

    Args:
        package: As for :func:`plugin_fields`.
        table: As a settings file has it; what cannot be told apart is left as it is.

    Returns:
        At least one table, in the order of the lists.

    Raises:
        ValueError: A list is empty.
    """
    if not isinstance(table, Mapping):
        return [table]
    if isinstance(stack := table.get("stack"), list):
        parts = [strengths(package, each) for each in stack]
        return [{**table, "stack": list(each)} for each in product(*parts)]
    name = table.get("name")
    path = import_path(package, name) if isinstance(name, str) else ""
    known = own_fields(package, path) if is_own(path) else plugin_fields(package).get(path)
    written = {} if known is None else known.settings
    lists = {
        key: value
        for key, value in table.items()
        if isinstance(value, list) and is_scalar(written.get(key, ""))
    }
    for key, value in lists.items():
        if not value:
            raise ValueError(f"{name}: {key} = [] has no values; give one, or a list of several")
    return [{**table, **dict(zip(lists, each, strict=True))} for each in product(*lists.values())]


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
    given = _by_path("attacks", table)
    if isinstance(given.get("own"), Mapping):  # settings that were checked before
        given |= given.pop("own")
    legal = _plugin("attacks", "attack", given.get("name")).settings
    refuse_reserved("attack", given["name"])
    common = common_keys(given.get("name"))
    own: JsonObject = {}
    kept: JsonObject = {}
    for key, value in given.items():
        if key not in common and key not in legal:
            raise ValueError(unknown_name(f"key of attack {given['name']}", key, {*common, *legal}))
        if key in common:
            kept[key] = value
        else:
            owner = f"attack {given['name']}"
            own[key] = checked_value(owner, key, value, written=legal[key])
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
    given = _by_path("defenses", table)
    common = {key: value for key, value in given.items() if key in _COMMON}
    own = {key: value for key, value in given.items() if key not in _COMMON}
    if "stack" not in own:
        return {**common, "stack": [] if own == {"name": "none"} else [_one(own)]}
    if set(own) != {"stack"}:
        raise ValueError("a [[defense]] with `stack` has no settings beside it")
    if not isinstance(own["stack"], list | tuple):
        raise ValueError(  # noqa: TRY004  pydantic reads ValueErrors alone
            f'stack is {own["stack"]!r}; write a list such as [{{ name = "weight-noise" }}]'
        )
    return {**common, "stack": [_one(each) for each in own["stack"]]}


def _by_path(package: Group, table: Mapping[str, Any]) -> JsonObject:
    """Return a table with the import path behind the short name that a package gave to a method."""
    given, short = dict(table), table.get("name")
    if isinstance(short, str) and (path := import_path(package, short)) != short:
        return {"called": short, **given, "name": path}
    return given


def _told(attack: object) -> bool:
    """Say whether an attack may know labels."""
    name = str(attack)
    fields = own_fields("attacks", name) if is_own(name) else plugin_fields("attacks").get(name)
    return fields is not None and fields.told


def _one(table: object) -> tuple[str, JsonObject]:
    if isinstance(table, list | tuple):  # settings that were checked before
        return table[0], table[1]
    if not isinstance(table, Mapping):
        raise ValueError(f'{table!r} is no defence; write {{ name = "weight-noise" }}')  # noqa: TRY004
    own = {key: value for key, value in table.items() if key != "name"}
    name = _by_path("defenses", table).get("name")
    legal = _plugin("defenses", "defence", name, "none").settings
    refuse_reserved("defence", str(name))
    for key, value in own.items():
        if key not in legal:
            raise ValueError(unknown_name(f"key of defence {name}", key, legal))
        own[key] = checked_value(f"defence {name}", key, value, written=legal[key])
    return str(name), own


def _plugin(package: _Listed, kind: str, name: object, *also: str) -> PluginFields:
    known = plugin_fields(package)
    if name is None:
        raise ValueError(f"every {kind} needs a name; legal: {', '.join(sorted([*known, *also]))}")
    if isinstance(name, str) and is_own(name):
        return own_fields(package, name)
    if not isinstance(name, str) or name not in known:
        raise ValueError(unknown_plugin(package, kind, str(name), [*known, *also]))
    return known[str(name)]
