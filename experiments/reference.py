"""The settings of an experiment as a page and as a JSON schema, made of the code that reads it.

``python -m experiments.reference docs/settings.md`` writes the page again; ``leakbed schema``
prints the schema, by which an editor completes and checks a settings file.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.settings.catalogues import plugin_fields
from experiments.settings.plugins import (
    AttackSettings,
    DefenseSettings,
    JsonObject,
    common_keys,
)
from experiments.settings.protocol import ProtocolSettings
from experiments.settings.schema import SECTIONS, CeilingSettings, Settings
from experiments.settings.values import is_scalar, schema_of
from leakbed.models import ACTIVATIONS, MODELS
from strategies import PROTOCOLS

_SECTIONS: dict[str, type[BaseModel]] = {**SECTIONS, "ceiling": CeilingSettings}
_TABLES = ("attack", "defense", "case", "sweep")
_OWN = {"type": "string", "pattern": "^[^:]+:[^:]+$", "description": "package.module:Class"}


_HEAD = """# Settings

Every key of an experiment's TOML file. `make readme` writes this page from the code that reads the
file; `leakbed schema > settings.schema.json` writes the same for editors. `leakbed list` names what
the catalogues hold."""
_PROTOCOLS = """## Protocols

What each takes, the default first. A key of the last column is its own: another
protocol refuses it, and a case that names another protocol leaves it behind.
[protocols.md](protocols.md) says what they mean."""
_ATTACK = """## `[[attack]]`

Keys of all attacks, or of those of a kind. Beside them stand an attack's own, below."""
_DEFENSE = """## `[[defense]]`

`name` and the defence's own settings, below; or `stack = [{ name = ... }, ...]`, applied in order.
`name = "none"` is no defence."""
_CASE = """## `[[case]]` and `[sweep]`

A case has a `name` and dotted keys of the sections that it replaces (`"protocol.rounds" = 5`), and
may choose `attacks` and `defenses` by name. A sweep lists values by dotted key: every case is run
with each.

A list where an attack's or a defence's own setting is one value stands for one attack or defence a
value: `share = [0.1, 0.5, 0.9]` is three. Two lists give every combination."""


def schema() -> JsonObject:
    """Return the JSON schema of a settings file.

    It refuses unknown keys and wrong types, as reading the file does. What depends on more than one
    key is checked by reading alone.

    Returns:
        A schema of draft 2020-12.
    """
    whole: JsonObject = Settings.model_json_schema()
    described = attributes(Settings)
    properties = whole["properties"]
    for key, told in properties.items():
        told["description"] = described.get(key, "")
    for name, kind in _SECTIONS.items():
        _describe(whole["$defs"][kind.__name__], kind)
        properties[name] = {**properties[name], "description": described.get(name, "")}
    _choose(whole["$defs"]["ProtocolSettings"])
    whole["$defs"]["ModelSettings"]["properties"]["name"]["examples"] = sorted(MODELS)
    whole["$defs"]["ModelSettings"]["properties"]["activation"]["examples"] = sorted(ACTIVATIONS)
    attacks = whole["$defs"].pop("AttackSettings")["properties"]
    whole["$defs"].pop("DefenseSettings")
    _describe({"properties": attacks}, AttackSettings)
    properties["attack"]["items"] = {"anyOf": [*_attacks(attacks), _foreign("attack")]}
    alternatives = [*_defenses(), _stack(), _foreign("defense"), _table({"name": _const("none")})]
    properties["defense"] = {
        "type": "array",
        "description": described["defense"],
        "items": {"anyOf": alternatives},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "Settings of a Leakbed experiment",
        "description": (inspect.getdoc(Settings) or "").partition("\n")[0],
        "additionalProperties": False,
    }


def page() -> str:
    """Return the reference of all keys as Markdown."""
    top = [key for key in Settings.model_fields if key not in {*_SECTIONS, *_TABLES}]
    shared = [key for key in AttackSettings.model_fields if key != "own"]
    parts = [
        _HEAD,
        "## At the top",
        _rows(Settings, top),
        *(part for name, kind in _SECTIONS.items() for part in (f"## `[{name}]`", _rows(kind))),
        _PROTOCOLS,
        _protocols(),
        _ATTACK,
        _rows(AttackSettings, shared),
        _DEFENSE,
        _rows(DefenseSettings, ["everywhere", "called"]),
        _CASE,
    ]
    known: dict[str, type] = {**ATTACKS, **ADVERSARIES, **INTRUDERS}
    parts += [
        "## Attacks",
        *_plugins("attacks", known),
        "## Defences",
        *_plugins("defenses", DEFENSES),
    ]
    return "\n\n".join(parts) + "\n"


def attributes(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of its attributes, by name, each as one line."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):  # a class's own words for what it inherits come last
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        told = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
        for names, text in told:
            line = " ".join(text.split()).replace("``", "`")
            found |= dict.fromkeys(names.split(", "), line)
    return found


def _describe(told: JsonObject, kind: type) -> None:
    for key, text in attributes(kind).items():
        if key in told["properties"]:
            told["properties"][key]["description"] = text


def _choose(told: JsonObject) -> None:
    """Say which keys and values each protocol takes; of one's own nothing is known."""
    told["properties"]["name"]["examples"] = sorted(PROTOCOLS)
    told["allOf"] = []
    for name, entry in PROTOCOLS.items():
        takes = {
            "propertyNames": {"enum": [*ProtocolSettings.model_fields, *entry.options]},
            "properties": {key: {"enum": list(legal)} for key, legal in entry.choices.items()},
        }
        asked = {"properties": {"name": _const(name)}}
        default = ProtocolSettings.model_fields["name"].default
        required = {} if name == default else {"required": ["name"]}
        told["allOf"].append({"if": {**asked, **required}, "then": takes})
        told["properties"] |= {key: {"description": f"Of {name}."} for key in entry.options}


def _attacks(common: Mapping[str, JsonObject]) -> list[JsonObject]:
    return [
        _table(
            {
                **{key: common[key] for key in sorted(common_keys(name)) if key in common},
                **_own_keys("attacks", name),
                "name": _const(name),
            }
        )
        for name in plugin_fields("attacks")
    ]


def _defenses() -> list[JsonObject]:
    shared = {key: _kept(key) for key in ("everywhere", "called")}
    return [
        _table({**shared, **_own_keys("defenses", name), "name": _const(name)})
        for name in plugin_fields("defenses")
    ]


def _stack() -> JsonObject:
    each = [
        _table({**_own_keys("defenses", name), "name": _const(name)})
        for name in plugin_fields("defenses")
    ]
    items = {"anyOf": [*each, _foreign("defense")]}
    shared = {key: _kept(key) for key in ("everywhere", "called")}
    return {
        **_table({**shared, "stack": {"type": "array", "items": items}}),
        "required": ["stack"],
    }


def _kept(key: str) -> JsonObject:
    return DefenseSettings.model_json_schema()["properties"][key]  # type: ignore[no-any-return]


def _own_keys(package: str, name: str) -> JsonObject:
    """Return the schema of a plug-in's own settings; a list stands for several of a scalar."""
    found: JsonObject = {}
    for key, written in plugin_fields(package)[name].settings.items():
        one = schema_of(written)
        several = {"type": "array", "items": one, "minItems": 1}
        found[key] = {"anyOf": [one, several]} if is_scalar(written) else one
    return found


def _const(name: str) -> JsonObject:
    return {"const": name}


def _table(properties: JsonObject) -> JsonObject:
    return {
        "type": "object",
        "properties": properties,
        "required": ["name"],
        "additionalProperties": False,
    }


def _foreign(kind: str) -> JsonObject:
    """Return what is known of a class of one's own before it is imported: its name."""
    return {
        "type": "object",
        "description": f"A {kind} of one's own",
        "properties": {"name": _OWN},
        "required": ["name"],
    }


def _rows(kind: type[BaseModel], keys: list[str] | None = None) -> str:
    told, types = attributes(kind), kind.model_json_schema()
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys or list(kind.model_fields):
        each = kind.model_fields[key]
        default = "" if each.is_required() else _value(each.get_default(call_default_factory=True))
        written = _type(types["properties"].get(key, {}), types.get("$defs", {}))
        lines.append(_line(f"`{key}`", written, default, told.get(key, "")))
    return "\n".join(lines)


def _protocols() -> str:
    lines = ["| protocol | labels | bottoms | optimizer_state | its own |", "|" + " --- |" * 5]
    for name, entry in PROTOCOLS.items():
        legal = {key: _or(values) for key, values in entry.choices.items()}
        own = "; ".join(f"`{key}`: {legal[key]}" for key in entry.options) or "none"
        common = (legal[key] for key in legal if key not in entry.options)
        lines.append(_line(f"`{name}`", *common, own))
    return "\n".join(lines)


def _or(values: Iterable[object]) -> str:
    return " or ".join(map(json.dumps, values))


def _plugins(package: str, catalogue: Mapping[str, type]) -> list[str]:
    parts = []
    for name, kind in catalogue.items():
        told, own = attributes(kind), plugin_fields(package)[name].settings
        if not own:
            parts.append(f"### `{name}`\n\nIt has no settings of its own.")
            continue
        lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for each in fields(kind):
            given = each.default if each.default_factory is MISSING else each.default_factory()
            default = "" if given is MISSING else _value(given)
            lines.append(_line(f"`{each.name}`", own[each.name], default, told.get(each.name, "")))
        parts.append(f"### `{name}`\n\n" + "\n".join(lines))
    return parts


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(default: Any) -> str:  # noqa: ANN401  of any setting
    if default is None:
        return ""
    if default == "":  # of the protocol that is named
        return ""
    plain = list(default) if isinstance(default, tuple) else default
    return f"`{json.dumps(plain)}`" if isinstance(plain, str | int | float | list | dict) else ""


def _type(told: JsonObject, known: JsonObject) -> str:
    """Return a schema in words."""
    if "$ref" in told:
        return _type(known[told["$ref"].rpartition("/")[2]], known)
    if "anyOf" in told:
        return " or ".join(dict.fromkeys(_type(e, known) for e in told["anyOf"] if e != _NONE))
    if "enum" in told or "const" in told:
        return _or(told.get("enum", [told.get("const")]))
    kind = _WORDS.get(told.get("type", ""), "any")
    limits = [
        f"{sign} {told[key]:g}"
        for key, sign in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in told
    ]
    return ", ".join([kind, *limits])


_NONE = {"type": "null"}
_WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "yes or no",
    "array": "list",
    "object": "table",
}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
