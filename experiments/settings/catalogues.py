"""Names and settings of what the catalogues have, read from their source.

Importing an attack imports torch, which takes seconds, and a typing mistake in a settings file
should be answered at once. Catalogues are plain dicts of classes, and a test compares this reading
with the classes.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_ADVERSARIES, _INTRUDERS = "ADVERSARIES", "INTRUDERS"
_KNOWN = "Knowledge.KNOWN_LABELS"
_CHOICES = ("labels", "bottoms", "optimizer_state")  # that every protocol has


@dataclass(frozen=True, kw_only=True)
class PluginFields:
    """What a settings file may say of one plug-in.

    Attributes:
        settings: Names of its dataclass fields, each with its type: as written, or itself where
            the class was imported and the text alone does not say it.
        told: Whether its threat model may name labels that the adversary knows.
    """

    settings: Mapping[str, Any]
    told: bool = False


@cache
def plugin_fields(package: str) -> dict[str, PluginFields]:
    """Return the catalogues of a package by key.

    Args:
        package: ``"attacks"`` (passive ones, adversaries, intruders) or ``"defenses"``.

    Returns:
        What a settings file may say of each plug-in.
    """
    catalogue = _parsed(_ROOT / package / "__init__.py")
    return {
        name: PluginFields(
            settings=_fields(catalogue, value.id), told=names_known(_source(catalogue, value.id))
        )
        for name, value in _entries(catalogue).items()
        if isinstance(value, ast.Name)
    }


def names_known(source: str) -> bool:
    """Say whether code names the knowledge of labels; a comment or a docstring is no code."""
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == _KNOWN
        for node in ast.walk(ast.parse(source))
    )


@cache
def adversary_names() -> tuple[str, ...]:
    """Return the keys of the catalogue of active adversaries."""
    return tuple(_entries(_parsed(_ROOT / "attacks" / "__init__.py"), only=_ADVERSARIES))


@cache
def intruder_names() -> tuple[str, ...]:
    """Return the keys of the catalogue of malicious clients."""
    return tuple(_entries(_parsed(_ROOT / "attacks" / "__init__.py"), only=_INTRUDERS))


@cache
def protocol_choices() -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return the catalogue of protocols by key, each as its ``strategies.Protocol.choices``."""
    contract = _parsed(_ROOT / "strategies" / "protocol.py")
    defaults = {
        ast.unparse(line.target): line.value
        for node in contract.body
        if isinstance(node, ast.ClassDef) and node.name == "Protocol"
        for line in node.body
        if isinstance(line, ast.AnnAssign)
    }
    found: dict[str, dict[str, tuple[Any, ...]]] = {}
    for name, entry in _entries(_parsed(_ROOT / "strategies" / "__init__.py")).items():
        written = entry.keywords if isinstance(entry, ast.Call) else []
        given = {each.arg: each.value for each in written}
        common = {key: given.get(key, defaults[key]) for key in _CHOICES}
        found[name] = {key: ast.literal_eval(value) for key, value in common.items() if value}
        found[name] |= ast.literal_eval(given.get("options", ast.Dict([], [])))
    return found


def metric_names() -> frozenset[str]:
    """Return the names of the oracle's metrics, on which code that trains must not depend."""
    source = _parsed(_ROOT / "leakbed" / "oracle" / "metrics.py")
    return frozenset(_entries(source, only="HIGHER_LEAKS_MORE"))


def _entries(catalogue: ast.Module, *, only: str | None = None) -> dict[str, ast.expr]:
    """Return the entries of the dicts a catalogue's module defines, or of the one of a name."""
    return {
        str(key.value): value
        for node in catalogue.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
        if only is None or ast.unparse(node.target) == only
        for key, value in zip(node.value.keys, node.value.values, strict=True)
        if isinstance(key, ast.Constant)
    }


def _fields(module: ast.Module, name: str) -> dict[str, str]:
    """Return the annotated fields of a class, its bases' first, class variables excepted."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            inherited = {
                field: written
                for base in node.bases
                if isinstance(base, ast.Name)
                for field, written in _fields(module, base.id).items()
            }
            return inherited | _annotated(node)
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            path = _ROOT / f"{str(node.module).replace('.', '/')}.py"
            return _fields(_parsed(path), name) if path.is_file() else {}
    return {}


def _source(catalogue: ast.Module, name: str) -> str:
    """Return the text of the file that a catalogue imports a class from."""
    for node in catalogue.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return (_ROOT / f"{str(node.module).replace('.', '/')}.py").read_text("utf-8")
    return ""


def _annotated(node: ast.ClassDef) -> dict[str, str]:
    """Return the fields a class itself adds; one that is no dataclass adds none."""
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return {}
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    }


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))
