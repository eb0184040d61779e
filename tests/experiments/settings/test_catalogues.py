"""Reading the catalogues from source says the same as importing them."""

from dataclasses import fields

import pytest

from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from defenses import DEFENSES
from experiments.settings.catalogues import (
    adversary_names,
    intruder_names,
    plugin_fields,
    protocol_choices,
)
from strategies import PROTOCOLS


@pytest.mark.parametrize(
    ("package", "catalogue"),
    [("attacks", {**ATTACKS, **ADVERSARIES, **INTRUDERS}), ("defenses", DEFENSES)],
)
def test_source_says_what_the_classes_say(package: str, catalogue: dict[str, type]) -> None:
    read = plugin_fields(package)
    assert set(read) == set(catalogue)
    for name, kind in catalogue.items():
        assert set(read[name].settings) == {field.name for field in fields(kind)}, name


def test_adversaries_are_those_of_their_catalogue_and_no_attack_is_one() -> None:
    assert set(adversary_names()) == set(ADVERSARIES)
    assert not set(ATTACKS) & set(ADVERSARIES)
    assert all(kind().threat.active for kind in ADVERSARIES.values())
    assert not any(kind().threat.active for kind in ATTACKS.values())


def test_intruders_are_those_of_their_catalogue() -> None:
    assert set(intruder_names()) == set(INTRUDERS)
    assert not set(INTRUDERS) & {*ATTACKS, *ADVERSARIES}


def test_protocols_and_their_choices_are_those_of_the_catalogue() -> None:
    assert protocol_choices() == {name: entry.choices for name, entry in PROTOCOLS.items()}
