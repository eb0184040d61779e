"""In which settings a cell of a report differs from others of the same name."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

SEEDED = frozenset({"seed", "case"})
"""Settings that differ from seed to seed of one cell."""

_NONE = "null"


def differing(settings: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """Return the settings that tell a cell from its namesakes.

    Args:
        settings: Of the cell.
        among: Of all cells of its name, itself included.

    Returns:
        Names and values such as ``scale 0.1, steps unset``; empty where nothing differs.
    """
    tables = [_flat(each) for each in among]
    own = defaultdict(lambda: _NONE, _flat(settings))
    keys = dict.fromkeys(key for table in (own, *tables) for key in table)
    telling = [key for key in keys if len({table.get(key, _NONE) for table in tables}) > 1]
    return ", ".join(f"{key.rpartition('.')[2]} {_told(own[key])}" for key in telling)


def _told(value: str) -> str:
    return "unset" if value == _NONE else value.strip('"')


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by dotted key, as text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in SEEDED:
            found[f"{prefix}{name}"] = json.dumps(value)
    return found
