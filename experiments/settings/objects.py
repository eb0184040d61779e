"""Objects in place of a settings file's names: each gets an import path, before all checks.

A class, a network, a protocol or data that code hands over stand wherever a catalogue key does.
What any process can import keeps its own path, and an object of a catalogue's class its key; the
settings of an object are read off it. All else gets a path of :mod:`leakbed.objects`, for this
process alone.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from typing import Any

from experiments.settings.plugins import JsonObject, Package
from experiments.settings.schema import SECTIONS, Settings, SettingsError
from leakbed.objects import lend, lent, own_path

_METHODS: Mapping[str, Package] = {"attack": "attacks", "defense": "defenses", "metric": "metrics"}
_HERE = "__main__:"  # what the program that runs defines


def named(settings: Mapping[str, Any]) -> JsonObject:
    """Return settings with a name wherever they hold an object.

    Data and networks that cannot be used raise the errors of :mod:`leakbed.data` and
    :mod:`leakbed.models`, and objects that are nothing of their kind a
    :class:`~experiments.settings.schema.SettingsError`.

    Args:
        settings: As a file has them, with objects.

    Returns:
        The same without; values that were names already are left for the settings' own checks.
    """
    found = dict(settings)
    for section in SECTIONS:
        if section in found:
            found[section] = _section(section, found[section])
    for kind in _METHODS:
        given = found.get(kind)
        if isinstance(given, list | tuple):
            found[kind] = [method(kind, each) for each in given]
        elif not _is_file_value(given):
            found[kind] = [method(kind, given)]
    if isinstance(cases := found.get("case"), list | tuple):
        found["case"] = [_overrides(case) for case in cases]
    if "sweep" in found:
        found["sweep"] = _overrides(found["sweep"], several=True)
    return found


def _is_file_value(given: object) -> bool:
    """Say whether a value is one that a settings file may have, right or wrong."""
    if isinstance(given, list):  # a list of rows has tuples, or tensors in it
        return all(map(_is_file_value, given))
    return isinstance(given, Mapping | str | int | float) or given is None


def _section(section: str, given: object) -> object:
    """Return a section's table; an object alone is its name."""
    if not isinstance(given, Mapping):
        named_so = _name(section, given)
        return given if named_so is given else {"name": named_so}
    names = [key for key in ("name", "public_from") if given.get(key) is not None]
    return {**given, **{key: _name(section, given[key]) for key in names}}


def _name(section: str, given: object) -> object:
    """Return the name of what a section names, or what is none for the settings to refuse."""
    if isinstance(given, str):
        here = _here(given)
        return given if here is None else _NAMERS[section](here)
    if _is_file_value(given):
        return given
    return _NAMERS[section](given)


def _overrides(given: object, *, several: bool = False) -> object:
    """Return a case, or a sweep, whose values are several, with the names of objects."""
    if not isinstance(given, Mapping):
        return given
    found = dict(given)
    for section in SECTIONS:
        if isinstance(found.get(section), Mapping):
            found[section] = _section(section, found[section])
        if (values := found.get(key := f"{section}.name")) is None:
            continue
        lists = several and isinstance(values, list | tuple)
        many = [_name(section, each) for each in (values if lists else [values])]
        found[key] = many if lists else many[0]
    return found


def method(kind: str, given: object) -> object:
    """Return the table of an attack, a defence or a metric.

    Args:
        kind: ``"attack"``, ``"defense"`` or ``"metric"``.
        given: A table whose name may be an object, an object, or a class.

    Returns:
        A table without objects; what an object has set stands beside its name. What is none of
        these is left for the settings' own checks.
    """
    if isinstance(given, Mapping):
        if isinstance(stack := given.get("stack"), list | tuple):
            return {**given, "stack": [method(kind, each) for each in stack]}
        told = given.get("name")
        here = _here(told) if isinstance(told, str) else told
        if _is_file_value(here):
            return given
        return {**_method(kind, here), **{key: v for key, v in given.items() if key != "name"}}
    checked = isinstance(given, tuple)  # one of a stack that was checked before
    return given if checked or _is_file_value(given) else _method(kind, given)


def _method(kind: str, given: object) -> JsonObject:
    """Return a table for an object or a class."""
    cls = given if isinstance(given, type) else type(given)
    name = _catalogued(kind, cls) or own_path(cls)
    chosen = {} if isinstance(given, type) else _chosen(given)
    plain = all(map(_is_plain, chosen.values()))
    if name is not None and plain:
        return {"name": name, **chosen}
    if isinstance(given, type) or (name is None and plain):
        return {"name": lend(cls, cls.__name__, why=_why(cls)), **chosen}
    key = next(key for key, value in chosen.items() if not _is_plain(value))
    if name is not None and ":" not in name:
        raise SettingsError(
            f"{kind} {name}: {key} is {_a(chosen[key])}; what the catalogue's classes are set to "
            "are numbers, texts and lists of them, such as its .item() or .tolist()"
        )
    why = f"an object whose setting {key!r} is {_a(chosen[key])}, which no settings file holds"
    return {"name": lend(_with_defaults(cls, given), cls.__name__, why=why)}


def _catalogued(kind: str, cls: type) -> str | None:
    """Return the catalogue key of a class of ours."""
    if kind == "metric":
        return None
    if kind == "defense":
        catalogues: Sequence[Mapping[str, type]] = (_of("defenses", "DEFENSES"),)
    else:
        catalogues = [_of("attacks", name) for name in ("ATTACKS", "ADVERSARIES", "INTRUDERS")]
    return next((key for each in catalogues for key, own in each.items() if own is cls), None)


def _of(package: str, catalogue: str) -> Mapping[str, type]:
    """Return a catalogue; where nobody has imported it, no object is of one of its classes."""
    found: Mapping[str, type] = getattr(sys.modules.get(package), catalogue, {})
    return found


def _chosen(given: object) -> JsonObject:
    """Return the settings of an object that are not its class's defaults."""
    own = fields(given) if is_dataclass(given) else ()  # a class of no contract is refused later
    values = {each.name: _as_number(getattr(given, each.name)) for each in own if each.init}
    return {each.name: values[each.name] for each in own if each.init and _differs(each, values)}


def _as_number(value: object) -> object:
    """Return a number of NumPy as one of Python; anything else as it is."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def _differs(each: Field[Any], values: JsonObject) -> bool:
    default = each.default
    if each.default_factory is not MISSING:
        default = each.default_factory()
    value = values[each.name]
    return not (value is default or (_is_plain(value) and _is_plain(default) and value == default))


def _is_plain(value: object) -> bool:
    """Say whether a value can stand in a settings file."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str) or value is None


def _with_defaults(cls: type, given: object) -> type:
    """Return a class whose defaults are what an object has set, under the class's own name."""

    def kept(value: object) -> Any:  # noqa: ANN401  as dataclasses has it
        return field(default_factory=lambda: value)

    own = [(e.name, e.type, kept(getattr(given, e.name))) for e in fields(given) if e.init]  # type: ignore[arg-type]
    made = make_dataclass(cls.__name__, own, bases=(cls,), frozen=True, kw_only=True)
    made.__module__, made.__doc__ = cls.__module__, cls.__doc__
    return made


def _model(given: object) -> str:
    from torch import nn  # noqa: PLC0415  whoever has an object has imported it

    from leakbed.models import redrawn  # noqa: PLC0415

    if isinstance(given, nn.Module):
        kind = type(given).__name__
        return lend(redrawn(given), kind, why="a network of this process's memory")
    return _function("model", given, "a network, or a class or function that makes one")


def _data(given: object) -> str:
    from leakbed.data import objects  # noqa: PLC0415  torch is imported where objects are

    if callable(given) and not hasattr(given, "__getitem__"):
        return _function("data", given, "data")
    return objects.lend_rows(given)


def _protocol(given: object) -> str:
    from strategies import Protocol  # noqa: PLC0415

    if not isinstance(given, Protocol):
        raise SettingsError(
            f"protocol: {given!r} is no protocol; give a catalogue key, 'package.module:name', or "
            "a strategies.Protocol"
        )
    return lend(given, "protocol", why="a Protocol of this process's memory")


def _function(section: str, given: object, wanted: str) -> str:
    """Return a path of a class or a function."""
    name = getattr(given, "__name__", None)
    if not callable(given) or not isinstance(name, str):
        raise SettingsError(
            f"{section}: {given!r} is no {section} to use; give a catalogue key, "
            f"'package.module:name', or {wanted}"
        )
    return own_path(given) or lend(given, name, why=_why(given))


_NAMERS: Mapping[str, Callable[[Any], str]] = {
    "data": _data,
    "model": _model,
    "protocol": _protocol,
}


def _here(name: str) -> object | None:
    """Return what a path of the program that runs names; None of any other path."""
    if not name.startswith(_HERE):
        return None
    return getattr(sys.modules.get("__main__"), name.removeprefix(_HERE), None)


def _why(given: object) -> str:
    kind = "class" if isinstance(given, type) else "function"
    module = getattr(given, "__module__", "?")
    inner = " within a function" if "<locals>" in getattr(given, "__qualname__", "") else ""
    return f"a {kind} that {module} defines{inner}"


def _a(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def refuse_elsewhere(settings: Settings) -> None:
    """Refuse objects of this process in an experiment that other processes work on.

    Args:
        settings: Checked.

    Raises:
        SettingsError: Ray's processes would have to import one; names each.
    """
    shared = settings.jobs > 1 or settings.ray_address is not None
    if not shared and settings.grid != "ray":
        return
    parts = {
        "data": [settings.data.name, settings.data.public_from or ""],
        "model": [settings.model.name],
        "protocol": [settings.protocol.name],
        "attack": [each.name for each in settings.attack],
        "defense": [name for each in settings.defense for name, _ in each.stack],
        "metric": [each.name for each in settings.metric],
    }
    for key, values in _dotted(settings):
        parts[key.partition(".")[0]] += [each for each in values if isinstance(each, str)]
    setting = "grid = 'ray'" if settings.grid == "ray" else "jobs or ray_address"
    faults = [
        f"{part}: {path} is {why}, and {setting} has processes that cannot import it; write it to "
        "a module and give 'module:name', or run on grid = 'local' with jobs = 1"
        for part, names in parts.items()
        for path, why in lent(names).items()
    ]
    if faults:
        raise SettingsError("\n".join(faults))


def _dotted(settings: Settings) -> list[tuple[str, Sequence[Any]]]:
    """Return what cases and sweeps put in place of a section's name."""
    keys = {f"{section}.name" for section in SECTIONS}
    cases = [(key, [case[key]]) for case in settings.case for key in keys & case.keys()]
    return [*cases, *((key, settings.sweep[key]) for key in keys & settings.sweep.keys())]
