"""Which code a piece of work depends on: what is reached from a module by its imports.

:func:`reach` reads import statements, wherever they stand, and ``import_module`` of a name written
out; nothing is executed. Every file reached counts by what it computes: comments, docstrings and
layout change nothing (:func:`read`).

A package of ours that only passes names on is followed for the names that are asked of it, and a
catalogue (a dict by name of what it imports) for the entries that a run uses. So another attack
beside it, or a further line in the catalogue, changes nothing for the others. What a catalogue
takes from another dict, and a dict of anything else, counts as a whole. A user's own packages are
followed as a whole, and so are installed ones that offer an entry point of ours: the next version
of a plug-in is other code. Other installed packages and Python's own modules are not followed,
since they do not change by being edited between runs. What code reads other than by importing
(weights, tables) and names put together while it runs are not found.
"""

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from leakbed.errors import OURS
from leakbed.plugins import GROUPS, installed

_ALL = "*"
_ROOT = Path(__file__).resolve().parents[1]
_INSTALLED = tuple(
    Path(folder).resolve()
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
    if (folder := sysconfig.get_path(key))
)
_INSTALLED_IN = {
    "site-packages",
    "dist-packages",
}  # a user's and a system's own, beside those above


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one file says, as far as it computes.

    Attributes:
        digest: Of its syntax tree without docstrings; of what is no Python, of its bytes.
        imports: Dotted names, each ending in the name that is asked for, or in ``*``.
        named: Import paths of catalogues in it, by their key.
    """

    digest: str
    imports: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()


@dataclass
class _Asked:
    """How far a search has come.

    Attributes:
        used: Keys of catalogues whose entries count.
        found: Digest by dotted name.
        done: Names that were followed already.
        waiting: Names to follow.
        packages: What the own files of packages say, by dotted name.
    """

    used: frozenset[str]
    found: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    packages: dict[str, "_Package"] = field(default_factory=dict)

    def package(self, module: str, file: Path) -> "_Package":
        """Return what a package's own file says, which is read once."""
        if module not in self.packages:
            self.packages[module] = _package(text_of(file), module)
        return self.packages[module]


def reach(modules: Iterable[str], *, used: Iterable[str] = ()) -> dict[str, str]:
    """Return what some modules depend on, themselves among it.

    Args:
        modules: Dotted names, ours or a user's.
        used: Keys of catalogues whose entries count.

    Returns:
        Digest by dotted name, in the order of names; of a package of ours only what is used.
    """
    given = tuple(modules)
    ours = [f"{module}.{_ALL}" for module in given if _is_ours(module)]
    search = _Asked(used=frozenset(used), waiting=ours)
    for name, file in reached(module for module in given if not _is_ours(module)).items():
        source = read(file)
        search.found[name] = source.digest
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        seen = (each for each in _absolutes(source, package) if _is_ours(each))
        search.waiting += seen
    while search.waiting:
        name = search.waiting.pop()
        if name not in search.done:
            search.done.add(name)
            _follow(name, search)
    return dict(sorted(search.found.items()))


@lru_cache(maxsize=4096)
def digest(modules: tuple[str, ...], used: frozenset[str] = frozenset()) -> str:
    """Return one digest of what some modules of ours depend on; computed once per process.

    The process runs the code that it imported, so a later edit does not change what it answers.

    Args:
        modules: As for :func:`reach`.
        used: As for :func:`reach`.

    Returns:
        16 hexadecimal digits.
    """
    text = "\0".join(f"{name}\0{each}" for name, each in reach(modules, used=used).items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reached(modules: Iterable[str]) -> dict[str, Path]:
    """Return the user's files that importing some modules reads, the modules' own among them.

    Args:
        modules: Dotted names, importable in this process.

    Returns:
        File by dotted name, in the order of names. A module that cannot be found is left out: the
        import of it fails by itself, or is one that the user's code can do without.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        for name, file, is_package in _files(waiting.pop()):
            if name not in found:
                found[name] = file
                package = name if is_package else name.rpartition(".")[0]
                waiting += [
                    each.removesuffix(f".{_ALL}") for each in _absolutes(read(file), package)
                ]
    return dict(sorted(found.items()))


def read(file: Path) -> Source:
    """Return what a file says: equal for files that differ in comments, docstrings or layout.

    Args:
        file: Of Python code; what cannot be parsed counts by its bytes.

    Returns:
        Its digest and imports.
    """
    return _read(text_of(file))


def text_of(file: Path) -> bytes:
    """Return a file's content; the one place at which sources are read."""
    return file.read_bytes()


@lru_cache(maxsize=4096)
def _read(text: bytes) -> Source:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # compiled, or a file that nobody can import either
        return Source(digest=hashlib.sha256(text).hexdigest())
    return Source(
        digest=hashlib.sha256(_told(tree).encode()).hexdigest(),
        imports=tuple(dict.fromkeys(_imports(tree.body, calls=_CALLS.search(text) is not None))),
        named=tuple(_paths(tree.body)),
    )


def _told(node: object) -> str:
    """Write a tree down without places and docstrings; what is empty in it is left out."""
    if isinstance(node, ast.AST):
        parts = []
        for name in node._fields:
            value: Any = getattr(node, name, None)
            if name == "body" and isinstance(node, _DOCUMENTED):
                value = value[_is_documented(value) :]
            if value is not None and value != []:
                parts.append(f"{name}={_told(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_told, node))}]"
    return repr(node)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _is_documented(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[0], ast.Expr) and _text(body[0].value) is not None


def _text(node: ast.AST | None) -> str | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None


def _imports(body: Iterable[ast.AST], *, calls: bool = True) -> Iterator[str]:
    """Yield the names that statements import, relative ones with their dots.

    What is imported for a type checker alone is not run. Expressions, which are most of a file, are
    looked into only where it may have ``calls`` that import.
    """
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (f"{alias.name}.{_ALL}" for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            base = "." * statement.level + (statement.module or "")
            dot = "" if base.endswith(".") else "."
            yield from (f"{base}{dot}{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.If) and _checks_types(statement.test):
            yield from _imports(statement.orelse, calls=calls)
        elif calls or not isinstance(statement, ast.expr):
            if isinstance(statement, ast.Call):
                yield from _called(statement)
            yield from _imports(ast.iter_child_nodes(statement), calls=calls)


_CALLS = re.compile(b"import_module|__import__")


def _checks_types(test: ast.expr) -> bool:
    """Say whether a test is ``TYPE_CHECKING`` itself: what it guards is never run."""
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _called(call: ast.Call) -> Iterator[str]:
    """Yield the name that ``import_module("name")`` or ``__import__("name")`` imports."""
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    if called not in {"import_module", "__import__"} or not call.args:
        return
    if (name := _text(call.args[0])) is not None:
        yield f"{name}.{_ALL}"


def _paths(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Yield key and import path of the catalogues of a module that import by name."""
    for statement in body:
        for key, value in _entries(statement):
            name, path = _text(key), _path(value)
            if name is not None and path is not None:
                yield name, path


def _path(value: ast.expr) -> str | None:
    """Return the dotted name of an import path written out; None of anything else."""
    path = _text(value) or ""
    fits = path.count(":") == 1 and path.replace(":", "").replace(".", "").isidentifier()
    return path.replace(":", ".") if fits else None


def _entries(statement: ast.stmt) -> list[tuple[ast.expr | None, ast.expr]]:
    """Return keys and values of a module's dict; the key of ``**other`` is None."""
    value = getattr(statement, "value", None)
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(value, ast.Dict):
        return []
    return list(zip(value.keys, value.values, strict=True))


def _absolutes(source: Source, package: str) -> Iterator[str]:
    """Yield the names that a source imports as seen from no package."""
    for name in source.imports:
        bare = name.lstrip(".")
        level = len(name) - len(bare)
        parts = package.split(".")
        above = parts[: len(parts) - level + 1] if level else []
        yield ".".join([*above, bare])


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in OURS


def _follow(name: str, search: _Asked) -> None:
    """Count what a name of ours stands for, and all packages that it lies in."""
    if not _is_ours(name):
        return
    parts = tuple(name.split("."))
    for depth in range(1, len(parts) + 1):
        module, file = ".".join(parts[:depth]), _file_of(_ROOT, parts[:depth])
        if file is None:
            return
        if file.name == "__init__.py":
            asked = parts[depth] if depth < len(parts) else _ALL
            is_module = asked != _ALL and _is_module(_ROOT, parts[: depth + 1])
            _count_package(module, file, "" if is_module else asked, search)
            continue
        if module not in search.found:
            source = read(file)
            search.found[module] = source.digest
            search.waiting += _absolutes(source, module.rpartition(".")[0])
            search.waiting += [path for key, path in source.named if key in search.used]
        return


@lru_cache(maxsize=4096)
def _file_of(root: Path, parts: tuple[str, ...]) -> Path | None:
    """Return the file of a module or a package; looked for once per process."""
    place = root.joinpath(*parts)
    files = place / "__init__.py", place.with_suffix(".py")
    return next((file for file in files if file.is_file()), None)


@lru_cache(maxsize=4096)
def _is_module(root: Path, parts: tuple[str, ...]) -> bool:
    """Say whether a name within a package is a file or a folder there; looked for once as well."""
    place = root.joinpath(*parts)
    return place.with_suffix(".py").is_file() or place.is_dir()


def _count_package(module: str, file: Path, asked: str, search: _Asked) -> None:
    """Count what a package's own file runs by itself, and what is asked of it."""
    said = search.package(module, file)
    counted = set(search.found.get(module, "").split())
    if module not in search.found:
        search.waiting += said.always
    counted.add(said.digest)
    for name, passed in said.passed.items():
        if asked in {name, _ALL}:
            search.waiting.append(passed)
    for catalogue, entries in said.catalogues.items():
        if asked in {catalogue, _ALL}:
            for key, text, names in entries:
                if key is None or key in search.used:
                    counted.add(text)
                    search.waiting += names
    search.found[module] = " ".join(sorted(counted))


@dataclass(frozen=True, kw_only=True)
class _Package:
    """What a package's own file says.

    Attributes:
        digest: Of what it runs by itself.
        always: Names that this needs.
        passed: By name that it passes on, the dotted name of that.
        catalogues: By name of a catalogue, key, digest and needs of each entry; of the entries that
            it takes from another dict (``**other``) the key is None, and they count always.
    """

    digest: str
    always: tuple[str, ...]
    passed: dict[str, str]
    catalogues: dict[str, list[tuple[str | None, str, list[str]]]]


@lru_cache(maxsize=256)
def _package(text: bytes, module: str) -> _Package:
    """Read a package's own file: an import that it neither uses nor exports is one it runs."""
    tree = ast.parse(text)
    body = tree.body[_is_documented(tree.body) :]
    bound: dict[str, str] = {}
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            names = [alias.asname or alias.name for alias in statement.names]
            bound |= zip(names, _seen_from(module, [statement]), strict=True)
    own: list[ast.stmt] = []
    catalogues: dict[str, list[tuple[str | None, str, list[str]]]] = {}
    listed: set[str] = set()
    exported: set[str] = set()
    for statement in body:
        target = _target(statement)
        if target == "__all__" and isinstance(statement, ast.Assign):
            exported = set(ast.literal_eval(statement.value))
        elif found := _catalogue(statement, bound | {n: f"{module}.{n}" for n in catalogues}):
            catalogues[target] = found
            listed |= _names(value for _, value in _entries(statement))
        elif not isinstance(statement, ast.ImportFrom) and not target.startswith("__"):
            own.append(statement)  # on __version__ and the like no number depends
    inner = _names(own) | (bound.keys() - exported - listed)
    return _Package(
        digest=_short(own),
        always=(
            *(bound[name] for name in sorted(inner & bound.keys())),
            *_seen_from(module, own),
        ),
        passed={name: bound[name] for name in sorted(exported & bound.keys())},
        catalogues=catalogues,
    )


def _catalogue(
    statement: ast.stmt, bound: Mapping[str, str]
) -> list[tuple[str | None, str, list[str]]]:
    """Return key, digest and needs of a catalogue's entries; none of any other statement.

    A catalogue has names written out for what is imported; another dict is code like any other.
    """
    found = []
    for key, value in _entries(statement):
        name, needs = _text(key), _needs(value, bound)
        if (key is not None and name is None) or not needs:
            return []
        found.append((name, _short([value]), needs))
    return found


def _seen_from(package: str, statements: Iterable[ast.AST]) -> list[str]:
    """Return what statements of a package's own file import, as seen from no package."""
    return list(_absolutes(Source(digest="", imports=tuple(_imports(statements))), package))


def _needs(value: ast.expr, bound: Mapping[str, str]) -> list[str]:
    """Return the dotted names that an entry of a catalogue stands for."""
    path = _path(value)
    return [*([path] if path else []), *(bound[n] for n in sorted(_names([value]) & bound.keys()))]


def _target(statement: ast.stmt) -> str:
    """Return the name that an assignment at the top of a module binds; empty of anything else."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return getattr(statement.targets[0], "id", "")
    return getattr(statement.target, "id", "") if isinstance(statement, ast.AnnAssign) else ""


def _names(trees: Iterable[ast.AST]) -> set[str]:
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _short(trees: Iterable[ast.AST]) -> str:
    return hashlib.sha256("".join(map(_told, trees)).encode()).hexdigest()[:16]


def _files(module: str) -> Iterator[tuple[str, Path, bool]]:
    """Yield name, file and whether it is a package of a module and the packages it lies in."""
    name, inside, parts = "", None, module.split(".")
    for depth, part in enumerate(parts):
        name = f"{name}.{part}" if name else part
        spec = _top(name) if depth == 0 else _within(name, inside)
        if spec is None:
            return
        inside = spec.submodule_search_locations
        if spec.has_location and spec.origin is not None:
            file = Path(spec.origin)
            if not file.is_file() or (is_installed(file) and parts[0] not in _offering()):
                return
            yield name, file, inside is not None
        if inside is None:
            return


def _within(name: str, inside: Iterable[str] | None) -> ModuleSpec | None:
    """Find a module in the folders of its package, which nobody need have imported."""
    places = [] if inside is None else list(inside)
    try:
        return PathFinder.find_spec(name, places)
    except KeyError:  # a folder without __init__.py within another that was not imported
        folders = [Path(place) / name.rpartition(".")[2] for place in places]
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder) for folder in folders if folder.is_dir()]
        return spec


def _top(name: str) -> ModuleSpec | None:
    """Find a module that lies in no package; none of Leakbed's."""
    if not name or name in OURS:
        return None
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec, such as __main__
        return None


def is_installed(file: Path) -> bool:
    """Say whether a file is Python's own or lies where packages are installed.

    Args:
        file: Of a module.

    Returns:
        False for what lies in a folder of the user's, a package installed as editable among it.
    """
    folders = file.resolve().parents
    return any(place in folders for place in _INSTALLED) or any(
        folder.name in _INSTALLED_IN for folder in folders
    )


def _offering() -> frozenset[str]:
    """Return the packages that offer something by an entry point of ours."""
    return _offering_on(tuple(sys.path))


@cache
def _offering_on(path: tuple[str, ...]) -> frozenset[str]:
    """Read what is installed once for each ``sys.path``: it takes a tenth of a second."""
    del path
    offers = (offer for group in GROUPS for offer in installed(group).values())
    return frozenset(offer.module.partition(".")[0] for offer in offers)
