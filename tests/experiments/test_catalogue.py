"""The catalogue names everything that is implemented, each with a line."""

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.catalogue import catalogue
from leakbed.data import DATASETS
from leakbed.models import MODELS
from strategies import PROTOCOLS


def test_every_entry_of_every_catalogue_is_there_with_a_line() -> None:
    found = catalogue()
    assert {kind: set(entries) for kind, entries in found.items()} == {
        "data sets": set(DATASETS),
        "models": set(MODELS),
        "protocols": set(PROTOCOLS),
        "attacks": {*ATTACKS, *ADVERSARIES, *INTRUDERS},
        "defences": set(DEFENSES),
    }
    lines = [entry["line"] for entries in found.values() for entry in entries.values()]
    assert all(lines)
    assert not any("\n" in line for line in lines)


def test_plugins_have_their_settings_and_defaults() -> None:
    assert catalogue()["attacks"]["constant-image"]["settings"] == {"value": "0.5"}
    assert catalogue()["models"]["mnistnet"]["settings"] == {}
