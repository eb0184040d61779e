"""Names of things: the nearest legal one for a typing mistake, and objects named by import path.

Every catalogue (data sets, models, attacks, defences, keys) answers an unknown name the same way.
"""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class ImportPathError(ValueError):
    """A ``package.module:name`` that cannot be imported."""


def unknown_name(kind: str, name: str, legal: Iterable[str]) -> str:
    """Return the error message for an unknown name: the nearest legal one, then all of them.

    Args:
        kind: What was asked for, in words, such as ``"data set"``.
        name: The unknown name.
        legal: Every name that would have been accepted.

    Returns:
        One line.
    """
    names = sorted(legal)
    lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    legal_names = f"legal: {', '.join(names)}" if names else "there is none to set"
    return f"unknown {kind} {name!r}; {hint}{legal_names}"


def format_error(error: BaseException, *, within: str | None = None) -> str:
    """Return what code of a user raised, and where, as one line.

    Args:
        error: Caught.
        within: The user's file, if it is known: its line is named, rather than that of the library
            that it called.

    Returns:
        Its class, its message, and the file and line it came from.
    """
    frames = [(each.tb_frame.f_code.co_filename, each.tb_lineno) for each in _traces(error)]
    message = " ".join(str(error).split())
    if not frames or isinstance(error, SyntaxError):  # a SyntaxError says its place itself
        return f"{type(error).__name__}: {message}"
    file, line = ([each for each in frames if each[0] == within] or frames)[-1]
    return f"{type(error).__name__}: {message} ({Path(file).name}, line {line})"


def _traces(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def import_object(path: str) -> object:
    """Return the object an import path names.

    Args:
        path: ``package.module:name``, importable in this process.

    Returns:
        The object called ``name`` in that module.

    Raises:
        ImportPathError: The path is malformed, nothing of that name can be imported, or the module
            raises.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ImportPathError(f"{path!r} is no import path; write 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportPathError(
            f"cannot import {module_name!r} for {path!r}: {error}; "
            "install the package, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # the module is a user's and may raise anything
        raise ImportPathError(
            f"importing {module_name!r} for {path!r} raised {format_error(error)}; mend the module"
        ) from error
    if not hasattr(module, name):
        if module_name == "__main__":
            raise ImportPathError(
                f"{path!r} is a name of the program that runs, and this one has none such; write "
                f"{name} to a module of its own and give 'module:{name}'"
            )
        defined = [item for item in vars(module) if not item.startswith("_")]
        raise ImportPathError(unknown_name(f"name in {module_name}", name, defined))
    return getattr(module, name)


def pairs(settings: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Return settings of TOML or JSON as pairs that can be hashed: their lists become tuples."""
    return tuple((str(key), _hashable(value)) for key, value in settings)


def listed(value: Any) -> Any:  # noqa: ANN401  JSON's
    """Return a value of :func:`pairs` as TOML or JSON had it: its tuples become lists."""
    return list(map(listed, value)) if isinstance(value, tuple) else value


def _hashable(value: Any) -> Any:  # noqa: ANN401  JSON's
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
