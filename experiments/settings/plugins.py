"""Which settings a plug-in has: what a settings file may say of an attack, a defence or a metric.

Importing an attack imports torch, which takes seconds, and a typing mistake in a settings file
should be answered at once. So names and settings of the catalogue's plug-ins are read from their
source: catalogues are plain dicts of classes, and a test compares this reading with the classes.
A class of one's own, named by import path, is imported: it may lie anywhere and be written in any
way, and the types of its fields are checked as they are.
"""

import ast
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from experiments.settings.values import is_known
from leakbed.contracts import Knowledge, ThreatModel
from leakbed.plugins import Contract, Group, PluginError, installed, is_own, own_class, role_of

JsonObject = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[2]
_ADVERSARIES, _INTRUDERS = "ADVERSARIES", "INTRUDERS"
_KNOWN = "Knowledge.KNOWN_LABELS"
_Listed = Literal["attacks", "defenses"]
Package = Literal["attacks", "defenses", "metrics"]
_CONTRACTS: Mapping[Package, Contract] = {
    "attacks": "attack",
    "defenses": "defence",
    "metrics": "metric",
}


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
            settings=_fields(catalogue, value.id), told=_names_known(_source(catalogue, value.id))
        )
        for name, value in _entries(catalogue).items()
        if isinstance(value, ast.Name)
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
        PluginError: It breaks the contract, or has the name of a catalogue's.
    """
    kind = own_class(path, _CONTRACTS[package])
    if kind.name in _listed(package):
        raise PluginError(
            f"{path} has the name {kind.name!r}, which is the catalogue's own; give it another"
        )
    return PluginFields(settings=_types(kind), told=_may_know(kind))


def _may_know(kind: type[Any]) -> bool:
    """Say whether a class names known labels: in its module, or, of a cell, in its own threat."""
    threat = getattr(kind(), "threat", None)
    if isinstance(threat, ThreatModel) and Knowledge.KNOWN_LABELS in threat.needs:
        return True
    module = inspect.getmodule(kind)
    try:
        return module is not None and _names_known(inspect.getsource(module))
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
        PluginError: An installed package offers a name that is the catalogue's.
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
    return found.value


def _listed(group: Group) -> Collection[str]:
    """Return the catalogue's own keys; those of models and data are read by importing them.

    Metrics are read from their source: settings are read by code that trains, which must not
    depend on the oracle's.
    """
    if group == "protocols":
        return protocol_names()
    if group == "models":
        return frozenset(vars(import_module("leakbed.models"))["MODELS"])
    if group == "data":
        return frozenset(vars(import_module("leakbed.data"))["DATASETS"])
    if group == "metrics":
        source = _parsed(_ROOT / "leakbed" / "oracle" / "metrics.py")
        return frozenset(_entries(source, only="HIGHER_LEAKS_MORE"))
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


def _names_known(source: str) -> bool:
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
def protocol_names() -> tuple[str, ...]:
    """Return the keys of the catalogue of protocols."""
    return tuple(_entries(_parsed(_ROOT / "strategies" / "__init__.py")))


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
