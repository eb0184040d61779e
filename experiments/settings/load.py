"""Settings from a file or a mapping, with overrides from the command line."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from experiments.settings.catalogues import plugin_fields
from experiments.settings.objects import named
from experiments.settings.plugins import (
    JsonObject,
    common_keys,
    import_path,
    own_fields,
)
from experiments.settings.schema import Settings, SettingsError
from leakbed.plugins import is_own

FLAGSHIP = Path(__file__).resolve().parents[1] / "studies" / "fl_vs_split" / "settings.toml"
"""The experiment of ``leakbed compare``."""


class ScaleError(ValueError):
    """An experiment has no settings of the scale asked for."""


def load_settings(
    source: "Settings | Mapping[str, Any] | str | Path", overrides: Sequence[str] = ()
) -> Settings:
    """Read and check an experiment's settings.

    Args:
        source: Settings, a mapping as a TOML file gives it, or a file. A mapping may hold objects
            where a file has names (:func:`experiments.settings.objects.named`).
        overrides: ``key=value`` pairs that replace values in it, such as ``data.nodes=8``; values
            are read as TOML, else as text.

    Returns:
        Checked settings.

    Raises:
        SettingsError: If the file cannot be read or anything in it is not legal.
    """
    if isinstance(source, Settings):
        table = source.model_dump(exclude_unset=True)
    else:
        table = named(source if isinstance(source, Mapping) else _read(Path(source)))
    for override in overrides:
        table = _overridden(table, override)
    try:
        return Settings.model_validate(table)
    except ValidationError as error:
        raise SettingsError("\n".join(map(_fault, _told(error)))) from None


def at_scale(file: str | Path, scale: str) -> Path:
    """Return the settings of an experiment at another scale: ``<scale>.toml`` beside its file.

    Args:
        file: The experiment's settings.
        scale: Such as ``"paper"``, the setting of the source rather than of a small machine.

    Returns:
        The other file.

    Raises:
        ScaleError: There is none; the message names those that are there.
    """
    found = Path(file).with_name(f"{scale}.toml")
    if not found.is_file() or found.name == Path(file).name:
        others = sorted(each.stem for each in Path(file).parent.glob("*.toml"))
        have = ", ".join(name for name in others if name != Path(file).stem) or "none"
        raise ScaleError(f"{file} has no settings at scale {scale!r} ({found}); it has: {have}")
    return found


def _read(path: Path) -> JsonObject:
    if not path.is_file():
        raise SettingsError(f"{path} is no file; give the path of an experiment's settings.toml")
    try:
        return tomllib.loads(
            path.read_text(encoding="utf-8-sig")
        )  # some editors mark the beginning
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None


def _overridden(table: JsonObject, override: str) -> JsonObject:
    key, equals, text = override.partition("=")
    if not equals:
        raise SettingsError(f"-o {override!r} must be key=value, such as -o data.nodes=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section, dot, rest = key.partition(".")
    if not dot:
        return {**table, key: value}
    inside = table.get(section, {})
    if isinstance(inside, list | tuple):
        takes = [_takes(section, each, rest) for each in inside]
        chosen = takes if any(takes) else [True] * len(inside)  # a typing mistake is told by all
        changed = [
            _with(each, rest, value) if chooses else each
            for each, chooses in zip(inside, chosen, strict=True)
        ]
        return {**table, section: changed}
    return {**table, section: _with(inside, rest, value)}


def _takes(section: str, table: object, key: str) -> bool:
    """Say whether an attack or a defence has a setting, its own or one that all have."""
    if not isinstance(table, Mapping) or section not in {"attack", "defense"}:
        return True
    package: Literal["attacks", "defenses"] = "attacks" if section == "attack" else "defenses"
    name = import_path(package, str(table.get("name")))
    own = own_fields(package, name) if is_own(name) else plugin_fields(package).get(name)
    common = common_keys(name) if section == "attack" else frozenset({"name", "everywhere"})
    common -= {"restarts"}  # only of use to attacks that choose among their tries
    return key in common or (own is not None and key in own.settings)


def _with(table: object, key: str, value: object) -> object:
    """Return a table with one more key; anything else is left for validation to refuse."""
    return {**table, key: value} if isinstance(table, Mapping) else table


def _told(error: ValidationError) -> list[Mapping[str, Any]]:
    """Return the faults; a list that is too short only because its entries are faulty is none.

    Of a value that may be a number or a text, what is wrong with it as the kind that it is not is
    none either.
    """
    faults = [_without_kind(fault) for fault in error.errors()]
    entries = {fault["loc"][0] for fault in faults if len(fault["loc"]) > 1}
    places = Counter(fault["loc"] for fault in faults)
    return [
        fault
        for fault in faults
        if not (fault["type"] == "too_short" and fault["loc"][0] in entries)
        and not (places[fault["loc"]] > 1 and fault["type"] == _other_kind(fault["input"]))
    ]


def _other_kind(value: object) -> str:
    return "int_type" if isinstance(value, str) else "string_type"


def _without_kind(fault: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a fault whose place is the key alone, also where the key takes `int | str`."""
    *key, last = fault["loc"] or ("",)
    kinds = {"int", "str", "constrained-int", "constrained-str"}  # as pydantic calls them
    return {**fault, "loc": tuple(key)} if key and last in kinds else fault


def _fault(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    ours = error["type"] == "value_error"  # our own messages name the value themselves
    known = isinstance(error["input"], Mapping | list | tuple | BaseModel)
    given = "" if ours or known else f" (got {error['input']!r})"
    return f"{place}: {message}{given}" if place else f"{message}{given}"
