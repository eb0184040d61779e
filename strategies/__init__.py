"""Strategies: the server parts of protocols, one per file. Listing one here puts it under test."""

from strategies import fedavg, vanilla_split
from strategies.setup import Entry

PROTOCOLS: dict[str, Entry] = {
    "fedavg": Entry(exchanges="weights", build=fedavg.build),
    "vanilla-split": Entry(exchanges="split", build=vanilla_split.build),
}

__all__ = ["PROTOCOLS", "Entry"]
