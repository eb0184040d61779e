"""The files that a user's own code consists of: whatever an import path reaches by its imports.

:func:`reached` is the one place that finds them. It reads import statements, wherever they stand,
and ``import_module`` of a name written out; nothing is executed. Installed packages, Python's own
modules and Leakbed's are not followed: the first two do not change by being edited between runs,
and the last are hashed as a whole. What code reads other than by importing (weights, tables) and
names put together while it runs are not found.

What a run ran on beside its settings and our code: its data and the user's own code.

Every process makes them anew. A function that draws without a seed, or numbers classes by a set,
returns other rows in each, and another folder on the path holds another module of the same name:
nodes would train on what the answer key does not hold. So each process says what it found, and all
must have found the same.
"""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message

from leakbed.data.config import DataConfig
from leakbed.errors import OURS
from leakbed.wire.messages import RAN_ON

if TYPE_CHECKING:
    from leakbed.models import Architecture


class CodeFolderError(ValueError):
    """The folder of a user's modules is none, or not the one they were found in."""


class EditedCodeError(RuntimeError):
    """A user's file that changed after this process imported it."""


_INSTALLED = tuple(
    Path(folder).resolve()
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
    if (folder := sysconfig.get_path(key))
)


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
                waiting += _imports(file, package)
    return dict(sorted(found.items()))


def find_first(run_config: Mapping[str, object]) -> Path | None:
    """Let modules be found first in the folder that a run config of ``flwr run`` names.

    Args:
        run_config: Its ``code``, else the folder of ``experiment`` where that is absolute.

    Returns:
        The folder; None where neither names one.

    Raises:
        CodeFolderError: ``code`` is relative, or no folder.
    """
    code, experiment = (str(run_config.get(key) or "") for key in ("code", "experiment"))
    folder = Path(code) if code else Path(experiment).parent
    if code and not (folder.is_absolute() and folder.is_dir()):
        raise CodeFolderError(
            f"code = {code!r} is no folder, or not an absolute path; give that of the folder that "
            "holds your modules"
        )
    if not folder.is_absolute():
        return None
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
    return folder


def own_modules(paths: Iterable[str | None]) -> tuple[str, ...]:
    """Return the modules of those names that are a user's import paths, each once.

    Args:
        paths: ``package.module:name``; anything else is a key of a catalogue, or nothing.

    Returns:
        Their ``package.module``, in order.
    """
    return tuple(sorted({path.partition(":")[0] for path in paths if path and ":" in path}))


def code_digest(modules: tuple[str, ...]) -> str:
    """Return a checksum of the files that some modules reach: their names and contents.

    Args:
        modules: From :func:`own_modules`.

    Returns:
        Hexadecimal digits, whatever folder the files lie in; empty where there is no module.

    Raises:
        EditedCodeError: A file is another than when this process first asked. The process goes on
            running the code that it imported then, whose numbers must not bear the new code's key.
    """
    if not modules:
        return ""
    files = reached(modules)
    found = {name: _checksum(file) for name, file in files.items()}
    for name, checksum in found.items():
        if _FIRST.setdefault(name, checksum) != checksum:
            raise EditedCodeError(
                f"{files[name]} was changed after this process imported it, and the code before is "
                "what goes on running; start a new process"
            )
    text = "\0".join(f"{name}\0{checksum}" for name, checksum in found.items())
    return hashlib.sha256(text.encode()).hexdigest()


def with_code(source: str, *names: str) -> str:
    """Return a hash of code with that of some plug-ins beside it, for a key.

    Args:
        source: Of the code that is in the key anyhow.
        *names: Of the plug-ins; a catalogue key adds nothing, since ``source`` has it.

    Returns:
        Both, joined.
    """
    return ":".join(part for part in (source, code_digest(own_modules(names))) if part)


_FIRST: dict[str, str] = {}  # by module: the checksum of its file when it was first asked for


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
            if not _is_users(file):
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


def _is_users(file: Path) -> bool:
    """Say whether a file is neither installed nor Python's own."""
    folders = file.resolve().parents
    return file.is_file() and not any(place in folders for place in _INSTALLED)


def _imports(file: Path, package: str) -> Iterator[str]:
    """Yield the dotted names that a file imports, seen from the package it lies in."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # compiled, or a file that nobody can import either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)  # finds the base as well
        elif isinstance(node, ast.Call):
            yield from _named(node, package)


def _absolute(module: str, level: int, package: str) -> str:
    """Return a relative name (of a level) as seen from no package."""
    if not level:
        return module
    parts = package.split(".")
    kept = parts[: len(parts) - level + 1]
    return ".".join([*kept, module] if module else kept)


def _named(call: ast.Call, package: str) -> Iterator[str]:
    """Yield the name that ``import_module("name")`` or ``__import__("name")`` imports."""
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    if called not in {"import_module", "__import__"} or not call.args:
        return
    first = call.args[0]
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        name = first.value.lstrip(".")
        yield _absolute(name, len(first.value) - len(name), package)


_SHOWN = 12  # digits of a checksum in a message


class OtherInputsError(ValueError):
    """A process has other data or another module than the experiment."""


@dataclass(frozen=True, kw_only=True)
class RanOn:
    """Checksums of a run's data and code, and the names they belong to.

    Attributes:
        data: Of all images and labels.
        code: Of the files that the user's own modules reach; empty without any.
        name: ``data.name``.
        modules: The user's modules, joined by commas, with the files they were found in.
        device: Where the process computes, in words; may differ from one process to another.
    """

    data: str
    code: str
    name: str
    modules: str
    device: str = ""

    @classmethod
    def here(
        cls,
        data: DataConfig,
        architecture: "Architecture",
        *,
        device: str = "",
        also: Iterable[str] = (),
    ) -> "RanOn":
        """Return what this process has.

        Args:
            data: The run's.
            architecture: Its network.
            device: Where it computes, in words.
            also: Names of the defences and attacks that play a part in it.

        Returns:
            Checksums. That of the data is computed once per process; of code that has changed since
            this process first asked, an :class:`~leakbed.provenance.EditedCodeError`.
        """
        modules = own_modules([data.name, data.public_from, architecture.name, *also])
        return cls(
            data=data.digest(),
            code=code_digest(modules),
            name=data.name,
            modules=_found(modules),
            device=device,
        )

    def record(self) -> ConfigRecord:
        """Return it as a Flower record."""
        return ConfigRecord({**asdict(self)})

    @classmethod
    def of(cls, reply: Message) -> "RanOn | None":
        """Return what a node says it has; None where it says nothing that can be read."""
        record = reply.content.get(RAN_ON)
        if not isinstance(record, ConfigRecord):
            return None
        found = {name: record.get(name) for name in cls.__dataclass_fields__}
        if not all(isinstance(value, str) for value in found.values()):
            return None
        return cls(**{name: str(value) for name, value in found.items()})

    def check(self, who: str, found: "RanOn | None") -> None:
        """Refuse a process that has something else.

        Args:
            who: Has it, in words.
            found: What it has.

        Raises:
            OtherInputsError: It says nothing, or has other code or other data.
        """
        if found is None:
            raise OtherInputsError(
                f"{who} does not say which data it has; every node must run the ClientApp "
                "clients:node_app of this version"
            )
        if found.code != self.code:
            raise OtherInputsError(
                f"{who} has other code of yours than the experiment: {found.modules}, where the "
                f"experiment has {self.modules}; make both the same, and start anew what keeps an "
                "earlier PYTHONPATH (a SuperLink, a SuperNode)"
            )
        if found.data != self.data:
            raise OtherInputsError(
                f"{who} has other data than the experiment: data.name = {self.name!r} gave "
                f"{found.data[:_SHOWN]}..., and {self.data[:_SHOWN]}... when the experiment was "
                "prepared. It must return the same rows in the same order in every process: draw "
                "with a fixed seed, and number classes in sorted() order rather than a set's"
            )


@lru_cache(maxsize=64)
def _found(modules: tuple[str, ...]) -> str:
    """Return modules with the files they were found in; once, since nodes are thousands."""
    files = reached(modules)
    return ", ".join(f"{name} ({files.get(name, 'no file of its own')})" for name in modules)
