"""Import paths for objects of this process: what a notebook hands over is named like all else.

Settings, keys, cards and traces hold names. So a network, a data set or a class of a notebook's
cell that somebody hands over gets an import path of this module, such as
``leakbed.objects:Grey_5f03a1c2_1``, under which this process finds it, and no other. Importing this
needs neither torch nor Flower.
"""

import re
import secrets
import sys
from collections.abc import Iterable
from itertools import count

from leakbed.lookup import ImportPathError

_PROCESS = secrets.token_hex(4)
_NUMBERS = count(1)
_LENT: dict[str, object] = {}
_WHY: dict[str, str] = {}
_MARK = re.compile(r"_[0-9a-f]{8}_\d+$|(?<=:data)_[0-9a-f]{12}$")


def lend(value: object, called: str, *, why: str) -> str:
    """Return an import path under which this process finds an object.

    What is lent twice has two paths: code of a cell may read anything, so nothing that was
    computed with it before is taken for what it would compute now.

    Args:
        value: The object; kept as long as the process lives.
        called: What it is called, such as its class's name.
        why: Why it has no import path of its own, to follow "it is".

    Returns:
        ``leakbed.objects:<called>_<process>_<number>``.
    """
    name = f"{_plain(called)}_{_PROCESS}_{next(_NUMBERS)}"
    return _kept(value, name, why)


def lend_data(value: object, *, content: str) -> str:
    """Return an import path for a function that returns data: the same for equal data alone.

    So cards of other data say so, and two folders of results can be told apart by it.

    Args:
        value: The function.
        content: A checksum of what it returns, in hexadecimal digits.

    Returns:
        ``leakbed.objects:data_<the first 12 of these digits>``.
    """
    return _kept(value, f"data_{content[:12]}", "data in this process's memory")


def own_path(value: object) -> str | None:
    """Return the import path under which any process finds a class or a function, or None.

    Args:
        value: Any object.

    Returns:
        ``package.module:name``; None of what lies in no module, or in the program that runs.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not isinstance(module, str) or module == "__main__" or not name.isidentifier():
        return None
    if getattr(sys.modules.get(module), name, None) is not value:
        return None
    return f"{module}:{name}"


def steady(path: str) -> str:
    """Return a name that is the same in every process, for what is drawn by it.

    Args:
        path: A catalogue key or an import path.

    Returns:
        It, of something lent without the process and the number.
    """
    return _MARK.sub("", path) if _is_lent(path) else path


def lent(paths: Iterable[str]) -> dict[str, str]:
    """Return which of some names are of objects of this process, and why they have no other.

    Args:
        paths: Catalogue keys and import paths.

    Returns:
        By path, a phrase to follow "it is".
    """
    found = (path for path in paths if _is_lent(path))
    return {path: _WHY.get(path.partition(":")[2], "of another process") for path in found}


def _is_lent(path: str) -> bool:
    return path.startswith(f"{__name__}:")


def _plain(called: str) -> str:
    return re.sub(r"\W", "_", called)


def _kept(value: object, name: str, why: str) -> str:
    _LENT[name], _WHY[name] = value, why
    return f"{__name__}:{name}"


def __getattr__(name: str) -> object:
    """Find what was lent; a name of another process is told as that."""
    if name in _LENT:
        return _LENT[name]
    if _MARK.search(name):
        raise ImportPathError(
            f"'{__name__}:{name}' is an object that another process was handed, and went with it; "
            "hand it over again, or write it to a module and give 'package.module:name'"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
