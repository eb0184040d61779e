"""Tables that name a plug-in keep its settings apart; none is taken by a common key."""

import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.catalogue import catalogue
from experiments.settings import plugin_tables
from experiments.settings.plugin_tables import ReservedSettingError
from experiments.settings.plugins import plugin_fields
from experiments.settings.schema import Settings

ATTACK = {"name": "constant-image"}


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({"name": "x", "attack": [ATTACK], **changes})


@pytest.mark.parametrize(
    ("attack", "key", "told"),
    [
        ("unsplit", "targets", "unsplit has a setting `targets`, which is a key of every attack;"),
        ("unsplit", "when", "`when`, which is a key of every attack of its kind; call it otherwis"),
        ("unsplit", "called", "`called`, which is a key of every attack; call it otherwise"),
        ("unsplit", "name", "`name`, which is a key of every attack; call it otherwise"),
        ("unsplit", "own", "`own`, which is a key of every attack; call it otherwise"),
        ("fsha", "control", "`control`, which is a key of every attack of its kind; call it other"),
        ("client-gan", "nodes", "`nodes`, which is a key of every attack of its kind; call it oth"),
        ("model-completion", "known_per_class", "`known_per_class`, which is a key of every attac"),
        ("smashed-noise", "everywhere", "`everywhere`, which is a key of every defence; call it o"),
        ("smashed-noise", "stack", "`stack`, which is a key of every defence; call it otherwise"),
    ],
)
def test_a_plug_in_whose_setting_a_common_key_would_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, attack: str, key: str, told: str
) -> None:
    package = "defenses" if attack == "smashed-noise" else "attacks"
    known = plugin_fields(package)[attack]
    wider = replace(known, settings={**known.settings, key: "int"})
    everyone = {**plugin_fields(package), attack: wider}
    other = {name: plugin_fields(name) for name in ("attacks", "defenses")}
    known_then = {**other, package: everyone}
    monkeypatch.setattr(plugin_tables, "plugin_fields", lambda name: known_then[name])
    kind = "defense" if package == "defenses" else "attack"
    with pytest.raises(ValidationError) as error:
        settings(**{kind: [{"name": attack}]})
    assert told in str(error.value)
    with pytest.raises(ReservedSettingError, match=re.escape(told)):  # where everything is listed
        catalogue()


def test_an_attack_keeps_its_own_settings_apart() -> None:
    (attack,) = settings(attack=[{"name": "unsplit", "targets": 3, "tv": 0.5}]).attack
    assert (attack.targets, attack.own) == (3, {"tv": 0.5})


def test_defenses_stack_in_order() -> None:
    stack = [{"name": "weight-noise", "scale": 0.1}, {"name": "weight-sparsification"}]
    (defense,) = settings(defense=[{"stack": stack}]).defense
    assert defense.name == "weight-noise+weight-sparsification"
    assert defense.stack[0] == ("weight-noise", {"scale": 0.1})
