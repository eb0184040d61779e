"""Methods, models and data of one's own, named by import path where a catalogue key stands.

``name = "mine:Grey"`` is the class ``Grey`` of the module ``mine``; an installed package may give
it a short name by an entry point of one of the groups below. A protocol, a model and data are no
classes of a contract: :func:`strategies.find_protocol`, :mod:`leakbed.models` and
:mod:`leakbed.data` import theirs. What can be said of a class without running it is checked here,
whenever it is looked up; :mod:`leakbed.contract_checks` runs it. Importing this needs neither torch
nor Flower.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from leakbed.contracts import ThreatModel
from leakbed.contracts.defense import Defense
from leakbed.contracts.hooks import refuse_uncalled
from leakbed.lookup import format_error, import_object, unknown_name

Contract = Literal["attack", "defence", "metric"]
Role = Literal["attack", "adversary", "intruder", "defence", "metric"]
Group = Literal["attacks", "defenses", "metrics", "protocols", "models", "data"]
GROUPS: Mapping[Group, str] = {
    "attacks": "leakbed.attacks",
    "defenses": "leakbed.defenses",
    "metrics": "leakbed.metrics",
    "protocols": "leakbed.protocols",
    "models": "leakbed.models",
    "data": "leakbed.data",
}
"""The entry points by which an installed package offers what is its own."""
_METHODS: Mapping[Role, tuple[str, ...]] = {
    "adversary": ("begin", "forge", "guess"),
    "intruder": ("begin", "turn", "learn", "samples"),
    "attack": ("run",),
    "metric": ("measure",),
}
_TABLES: Mapping[Role, str] = {"defence": "defense", "metric": "metric"}  # of others "attack"
Kind = TypeVar("Kind")


class PluginError(ValueError):
    """A class that does not keep the contract of what it was named as."""


def is_own(name: str) -> bool:
    """Say whether a name is an import path rather than a catalogue key."""
    return ":" in name


def picked(name: str, catalogue: Mapping[str, type[Kind]], contract: Contract) -> type[Kind]:
    """Return the class of a catalogue key or of an import path.

    What cannot be imported, or is of another contract, raises as in :func:`own_class`.

    Args:
        name: A key of the catalogue, or ``package.module:Class``.
        catalogue: The repository's own.
        contract: What the class is to be.

    Returns:
        The class.
    """
    return own_class(name, contract) if is_own(name) else catalogue[name]


@cache
def own_class(path: str, contract: Contract) -> type[Any]:
    """Return the class of an import path, checked as far as that needs no run of it.

    What cannot be imported is an :class:`~leakbed.lookup.ImportPathError`.

    Args:
        path: ``package.module:Class``.
        contract: What the class is to be.

    Returns:
        The class.

    Raises:
        PluginError: It is no class, or breaks the contract; the message has each breach.
    """
    kind = import_object(path)
    if not isinstance(kind, type):
        raise PluginError(f"{path} is {kind!r}; name a class, whose fields are the settings")
    if found := form_breaches(kind, contract):
        raise PluginError(f"{path} is no {contract} to use: {'; '.join(found)}")
    return kind


def role_of(kind: type) -> Role | None:
    """Return which contract a class looks like: by its base, or by its methods; None for none."""
    if issubclass(kind, Defense):
        return "defence"
    for role, methods in _METHODS.items():
        if all(callable(getattr(kind, method, None)) for method in methods):
            return role
    return None


def form_breaches(kind: type, contract: Contract) -> list[str]:
    """Return in what a class breaks a contract, as far as that shows without running it.

    Args:
        kind: The class.
        contract: What it is to be.

    Returns:
        One phrase for each breach, with what to do; empty for none.
    """
    role = role_of(kind)
    if role is None or contract != (role if role in {"defence", "metric"} else "attack"):
        return [_other(role, contract)]
    found = _dataclass_breaches(kind)
    found += [
        f"{attribute} is {getattr(kind, attribute, None)!r}; write `{attribute}: ClassVar[str]`"
        for attribute in ("name", "source")
        if not isinstance(getattr(kind, attribute, None), str) or not getattr(kind, attribute)
    ]
    if found:
        return found
    try:
        if role == "metric":
            return _metric_breaches(kind)
        return _defense_breaches(kind) if role == "defence" else _threat_breaches(kind, role)
    except Exception as error:  # noqa: BLE001  a stranger's class may raise anything
        return [f"with its defaults it raised {format_error(error)}"]


def _other(role: Role | None, contract: Contract) -> str:
    if role is not None:
        table = _TABLES.get(role, "attack")
        return f"it is a{'n' * (role[0] in 'ai')} {role}; name it in a table [[{table}]]"
    if contract == "defence":
        return "it does not inherit leakbed.contracts.Defense"
    if contract == "metric":
        return "it has no method `measure` (see leakbed.contracts.Metric)"
    needed = "; or ".join(
        f"{role}: {', '.join(names)}" for role, names in _METHODS.items() if role != "metric"
    )
    return f"it has the methods of no attack ({needed})"


def _dataclass_breaches(kind: type) -> list[str]:
    if not is_dataclass(kind) or "__dataclass_params__" not in vars(kind):
        return ["it is no dataclass; write @dataclass(frozen=True, kw_only=True) above it"]
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return ["it can be changed; write @dataclass(frozen=True, kw_only=True) above it"]
    return [
        f"setting {each.name} has no default; give it one"
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    ]


def _threat_breaches(kind: type, role: Role) -> list[str]:
    threat = getattr(kind(), "threat", None)
    if not isinstance(threat, ThreatModel):
        return [f"threat is {threat!r}; return a leakbed.contracts.ThreatModel from a property"]
    if threat.active != (role == "adversary") and role != "intruder":
        return [f"threat.active is {threat.active}, but it is an {role} by its methods"]
    if threat.kinds and role != "attack":
        return [
            f"it is an {role} and names {', '.join(threat.kinds)}, which is granted of a run that "
            "is over; only an attack with a method `run` has evidence or knowledge of its own"
        ]
    return []


def _metric_breaches(kind: type) -> list[str]:
    kind()  # its defaults must be legal
    if isinstance(more := getattr(kind, "higher_leaks_more", None), bool):
        return []
    return [f"higher_leaks_more is {more!r}; write `higher_leaks_more: ClassVar[bool] = True`"]


def _defense_breaches(kind: type[Defense]) -> list[str]:
    protects = getattr(kind, "protects", None)
    if not isinstance(protects, frozenset) or not protects:
        return [f"protects is {protects!r}; write frozenset({{Protects.SMASHED}}) or the like"]
    refuse_uncalled(kind)
    if kind.claims == "" and kind().claiming:
        return ["it is claiming without `claims`; say what it claims"]
    return []


def installed(group: Group) -> dict[str, EntryPoint]:
    """Return what installed packages offer of a kind, by their short names."""
    return {each.name: each for each in _offers(group)}


def _offers(group: Group) -> tuple[EntryPoint, ...]:
    """Return all entry points of a kind; they are read again where Python's path has changed."""
    return _read(tuple((place, _changed(place)) for place in sys.path))[group]


@lru_cache(maxsize=1)
def _read(places: tuple[tuple[str, int], ...]) -> Mapping[Group, tuple[EntryPoint, ...]]:
    del places  # what is read depends on them
    every = entry_points()  # this takes milliseconds, and every cell of an experiment asks
    return {group: tuple(every.select(group=name)) for group, name in GROUPS.items()}


def _changed(place: str) -> int:
    """Return when a folder was last changed, as by an installation; 0 of what is no folder."""
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def offering(group: Group, name: str) -> list[str]:
    """Return the names of installed packages that offer a short name, each for another object."""
    found = {each.value: each for each in _offers(group) if each.name == name}
    return sorted(each.dist.name if each.dist else path for path, each in found.items())


def unknown_plugin(
    group: Group, kind: str, name: str, legal: Iterable[str], *, form: str = "package.module:Class"
) -> str:
    """Return the error message for a name that is neither a catalogue's nor an installed package's.

    Args:
        group: What is named.
        kind: The same in words.
        name: As a settings file has it.
        legal: The catalogue's own.
        form: Of an import path of such a thing.

    Returns:
        One line.
    """
    message = unknown_name(kind, name, {*legal, *installed(group)})
    if also := [
        other for each, other in GROUPS.items() if each != group and name in installed(each)
    ]:
        return f"{message}; {name!r} is offered as one of {', '.join(also)}"
    package, _, last = name.rpartition(".")
    if package and all(part.isidentifier() for part in name.split(".")):
        return f"{message}; or an import path, with a colon: '{package}:{last}'"
    return f"{message}; or {form!r} for your own, or install the package that offers it"
