"""Everything that is implemented, a line and the settings of each, read from the catalogues."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from attacks import ADVERSARIES, ATTACKS
from defenses import DEFENSES
from leakbed.api import Catalogue, Entry
from leakbed.data import DATASETS
from leakbed.models import MODELS
from strategies import PROTOCOLS


def catalogue() -> Catalogue:
    """Return data sets, models, protocols, attacks and defences by name."""
    return {
        "data sets": {name: _entry(line) for name, line in DATASETS.items()},
        "models": {name: _entry(network.words) for name, network in MODELS.items()},
        "protocols": {name: _entry(_module(entry.build)) for name, entry in PROTOCOLS.items()},
        "attacks": {name: _plugin(kind) for name, kind in {**ATTACKS, **ADVERSARIES}.items()},
        "defences": {name: _plugin(kind) for name, kind in DEFENSES.items()},
    }


def _plugin(kind: type) -> Entry:
    """Return a frozen dataclass of settings."""
    settings = {each.name: _default(each) for each in fields(kind)} if is_dataclass(kind) else {}
    return Entry(line=_first(inspect.getdoc(kind)), settings=settings)


def _default(setting: Field[Any]) -> str:
    if setting.default is not MISSING:
        return repr(setting.default)
    if setting.default_factory is not MISSING:
        return repr(setting.default_factory())
    return "required"


def _module(build: Callable[..., object]) -> str:
    """Return the first line of the file a protocol is built in."""
    return _first(sys.modules[build.__module__].__doc__)


def _first(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].rstrip(".")


def _entry(line: str) -> Entry:
    return Entry(line=line, settings={})
