"""BibTeX of what a run used: its protocols, data sets, networks, attacks and defences.

The entries stand in ``references.bib`` beside this file. An attack or a defence is found there by
the address in its ``source``; the rest of the catalogue by :data:`CITED`. A class of one's own may
bring its entry as ``bibtex: ClassVar[str]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.results.cards import Card
from experiments.settings.plugins import import_path
from leakbed.lookup import import_object
from leakbed.plugins import Group, is_own

_FILE = Path(__file__).with_name("references.bib")

CITED: Mapping[Group, Mapping[str, Sequence[str]]] = {
    "protocols": {
        "fedavg": ["mcmahan2017communication"],
        "parallel-split": ["jeon2020privacy", "kohankhaki2024parallel"],
        "splitfed-v1": ["thapa2022splitfed"],
        "splitfed-v2": ["thapa2022splitfed"],
        "u-shaped": ["vepakomma2018split"],
        "vanilla-split": ["gupta2018distributed"],
        "vertical-split": ["ceballos2020splitnn", "romanini2021pyvertical"],
    },
    "data": {
        "breast-cancer": ["street1993nuclear", "pedregosa2011scikit"],
        "cifar10": ["krizhevsky2009learning"],
        "cifar100": ["krizhevsky2009learning"],
        "fashion-mnist": ["xiao2017fashion"],
        "image-folder": [],
        "mnist": ["lecun1998gradient"],
        "mnist-5k": ["lecun1998gradient", "raschka2018mlxtend"],
        "photographs": ["pedregosa2011scikit"],
    },
    "models": {
        "cifarnet": ["erdogan2022unsplit", "he2019model"],
        "fsha-resnet": ["pasquini2021unleashing"],
        "lenet-sigmoid": ["zhao2024deep", "zhu2019deep"],
        "mlp-bottom": [],
        "mlp2": ["zhao2024deep"],
        "mnistnet": ["erdogan2022unsplit", "he2019model"],
        "resnet18": ["he2016deep"],
        "tabular-mlp": ["li2022label"],
        "two-blocks": [],
    },
}
"""What catalogue entries other than classes are from; nothing where they are the project's own."""

_IN_WORDS: Mapping[str, str] = {
    "protocols": "protocol",
    "data": "data set",
    "models": "network",
    "attacks": "attack",
    "defenses": "defence",
}


@cache
def entries() -> dict[str, str]:
    """Return every entry of the bibliography by its key."""
    found = re.finditer(r"^@\w+\{([^,]+),.*?^\}", _FILE.read_text(encoding="utf-8"), re.M | re.S)
    return {each[1]: each[0] for each in found}


@cache
def _by_address() -> dict[str, str]:
    """Return the keys of entries by their addresses."""
    found = {}
    for key, text in entries().items():
        if address := re.search(r"^  url = \{(.+)\},$", text, re.M):
            found[address[1]] = key
    return found


def keys_of(source: str) -> list[str]:
    """Return the keys of what a method's source names by address.

    Args:
        source: The ``source`` of a class.

    Returns:
        None where it names no address of the bibliography.
    """
    known = _by_address()
    return [known[each] for each in re.findall(r"https://[^\s,;]+", source) if each in known]


def bibliography(cards: Iterable[Card]) -> str:
    """Return BibTeX of everything that some results used.

    Args:
        cards: Of one run.

    Returns:
        Entries in the order of their keys. Each says in a comment for what it is cited; another
        comment names what has none and is not the project's own.
    """
    cited: dict[str, list[str]] = {}
    own: dict[str, str] = {}
    lacking = []
    for group, name in dict.fromkeys(use for card in cards for use in _uses(card)):
        words = f"{_IN_WORDS[group]} {name}"
        keys, text = _found(group, name)
        for key in keys:
            cited.setdefault(key, []).append(words)
        if text is None:
            lacking.append(words)
        elif text:
            own[words] = text
    known = entries()
    parts = [f"% For {', '.join(cited[key])}.\n{known[key]}" for key in sorted(cited)]
    parts += [f"% For {words}.\n{text.strip()}" for words, text in own.items()]
    if lacking:
        parts.append(f"% No entry is known of: {', '.join(lacking)}.")
    return "\n\n".join(parts) + "\n"


def _uses(card: Card) -> Iterator[tuple[Group, str]]:
    """Yield kind and name of everything a card names."""
    data: Any = card.settings.get("data") or {}
    stack: Any = card.settings.get("defense") or {}
    yield "protocols", card.protocol
    yield "data", card.data
    if public := data.get("public_from"):
        yield "data", public
    yield "models", card.model
    yield "attacks", card.attack
    for name, _ in stack.get("stack", ()):
        yield "defenses", name


def _found(group: Group, name: str) -> tuple[Sequence[str], str | None]:
    """Return the keys that a name is cited by, and an entry of its own.

    The latter is empty where none is needed, and ``None`` where one is needed and not known.
    """
    if name in CITED.get(group, {}):
        return CITED[group][name], ""
    listed: Mapping[str, Any] = {**ATTACKS, **ADVERSARIES, **INTRUDERS, **DEFENSES}
    kind = listed.get(name) or _imported(group, name)
    if text := getattr(kind, "bibtex", ""):
        return [], str(text)
    keys = keys_of(str(getattr(kind, "source", "")))
    return keys, "" if keys or name in listed else None


def _imported(group: Group, name: str) -> object:
    """Return what an import path names; ``None`` where it is not on this machine."""
    try:
        path = import_path(group, name)
        return import_object(path) if is_own(path) else None
    except ValueError:
        return None
