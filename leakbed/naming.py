"""Names of things: the nearest legal one for a typing mistake, and objects named by import path.

Every catalogue (data sets, models, attacks, defences, keys) answers an unknown name the same way.
"""

import difflib
import importlib
from collections.abc import Iterable


class ImportPathError(ValueError):
    """A ``package.module:name`` that cannot be imported."""


def unknown(kind: str, name: str, legal: Iterable[str]) -> str:
    """Return the error message for an unknown name: the nearest legal one, then all of them.

    Args:
        kind: What was asked for, in words, such as ``"data set"``.
        name: The unknown name.
        legal: Every name that would have been accepted.

    Returns:
        One line.
    """
    names = sorted(legal)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}legal: {', '.join(names)}"


def imported(path: str) -> object:
    """Return the object an import path names.

    Args:
        path: ``package.module:name``, importable in this process.

    Returns:
        The object called ``name`` in that module.

    Raises:
        ImportPathError: The path is malformed, or nothing of that name can be imported.
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
    if not hasattr(module, name):
        defined = [item for item in vars(module) if not item.startswith("_")]
        raise ImportPathError(unknown(f"name in {module_name}", name, defined))
    return getattr(module, name)
