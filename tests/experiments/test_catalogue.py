"""The catalogue names everything that is implemented, each with a line."""

import pytest

import leakbed
from attacks import ADVERSARIES, ATTACKS, INTRUDERS, ConstantImage
from defenses import DEFENSES
from experiments.catalogue import catalogue, check_plugin
from leakbed.data import DATASETS
from leakbed.models import MODELS
from leakbed.plugins import PluginError
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


def test_a_sound_class_has_no_breach_and_another_says_what_is_wrong() -> None:
    assert leakbed.check(ConstantImage) == []
    (clash,) = check_plugin("attacks.baselines:ConstantImage")
    assert "the catalogue's own" in clash
    (nothing,) = check_plugin(dict)
    assert "the methods of no attack" in nothing


def test_what_is_no_class_is_refused() -> None:
    for name in ("grey", "math:pi"):
        with pytest.raises(PluginError, match=r"'package\.module:Class'"):
            check_plugin(name)
