"""What is implemented, as the tables between two markers of README.md.

The rows are read from the catalogues, so a new protocol, attack or defence documents itself; a test
asserts that README.md is current. ``make readme`` writes it again.
"""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attacks import ADVERSARIES, ATTACKS
from defenses import DEFENSES
from leakbed.contracts import Adversary, Attack
from strategies import PROTOCOLS

BEGIN = "<!-- catalogue: written by `make readme` -->"
END = "<!-- end of catalogue -->"


class MissingMarkersError(ValueError):
    """A text that does not say where the tables belong."""


def tables() -> str:
    """Return the tables of protocols, attacks (published ones first, then baselines), defences."""
    protocols = [
        (f"`{name}`", _summary(inspect.getmodule(entry.build))) for name, entry in PROTOCOLS.items()
    ]
    known: dict[str, type[Attack | Adversary[Any]]] = {**ATTACKS, **ADVERSARIES}
    attacks = [
        (f"`{name}`", _summary(kind), kind().threat.in_words(), _link(kind.source))
        for name, kind in known.items()
    ]
    defences = [
        (f"`{name}`", _summary(kind), ", ".join(sorted(kind.protects)), _link(kind.source))
        for name, kind in DEFENSES.items()
    ]
    published_first = sorted(attacks, key=lambda row: "https://" not in row[-1])
    return "\n\n".join(
        [
            _table(("protocol", "what it does"), protocols),
            _table(("attack", "what it does", "threat model", "source"), published_first),
            _table(("defence", "what it does", "protects", "source"), defences),
        ]
    )


def current(text: str) -> str:
    """Return a text with the tables between its markers written again.

    Args:
        text: Holds ``BEGIN`` and ``END`` once each, in this order.

    Returns:
        The same text with up-to-date tables.

    Raises:
        MissingMarkersError: The markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MissingMarkersError(f"no tables can be written without the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0].rstrip(".")


def _link(source: str) -> str:
    """Return a source that ends in an address as a link."""
    name, address, path = source.partition("https://")
    return f"[{name.rstrip(', ') or 'paper'}]({address}{path})" if address else source


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(current(page.read_text()))
