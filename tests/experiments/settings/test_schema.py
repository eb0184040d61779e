"""Settings refuse what is not legal, and say what would be."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.catalogue import catalogue
from experiments.settings import plugins
from experiments.settings.catalogues import plugin_fields
from experiments.settings.load import load_settings
from experiments.settings.plugins import ReservedSettingError
from experiments.settings.schema import Settings

ATTACK = {"name": "constant-image"}


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({"name": "x", "attack": [ATTACK], **changes})


def test_defaults_are_one_undefended_case() -> None:
    plain = settings()
    assert [each.name for each in plain.defense] == ["none"]
    assert plain.case == ()
    assert plain.data.name == "mnist-5k"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'"),
        ({"data": {"nodse": 4}}, "unknown key 'nodse'; did you mean 'nodes'"),
        ({"protocol": {"name": "fedavgg"}}, "unknown protocol 'fedavgg'; did you mean 'fedavg'"),
        (
            {"case": [{"name": "a", "attacks": []}]},
            "attacks is []; write a list of: constant-image",
        ),
        ({"case": [{"name": "a", "attacks": ["dlm"]}]}, "give it a [[attack]] table"),
        ({"case": [{"name": "a", "defenses": ["nopeek"]}]}, "give it a [[defense]] table"),
        ({"attack": [{**ATTACK, "everywhere": False}]}, "it would never run"),
        (
            {
                "attack": [{**ATTACK, "called": "grey"}],
                "case": [{"name": "a", "attacks": ["gray"]}],
            },
            "unknown attack 'gray'; did you mean 'grey'",
        ),
        (
            {
                "attack": [{**ATTACK, "everywhere": False}],
                "case": [{"name": "a"}, {"name": "b", "attacks": ["constant-image"]}],
            },
            "a has no attack: none is tried everywhere",
        ),
        ({"defense": [{"name": "nopeek", "everywhere": 1}]}, "valid boolean"),
        ({"attack": [{"name": "unsplitt"}]}, "unknown attack 'unsplitt'; did you mean 'unsplit'"),
        ({"attack": [{"name": "unsplit", "outer_step": 3}]}, "did you mean 'outer_steps'"),
        ({"attack": [{**ATTACK, "collect": "frist"}]}, "'first', 'middle' or 'last'"),
        ({"attack": [{**ATTACK, "collect": 0}]}, "greater than or equal to 1"),
        ({"attack": [{"name": "fsha", "collect": 1}]}, "unknown key of attack fsha 'collect'"),
        ({"attack": [{"name": "dlm", "restart": 3}]}, "did you mean 'restarts'"),
        ({"attack": [{"name": "fsha", "restarts": 3}]}, "unknown key of attack fsha 'restarts'"),
        ({"attack": [{"name": "fsha", "critic_rat": 3}]}, "did you mean 'critic_rate'"),
        ({"attack": [{"name": "fsha", "checkpoint_every": 0}]}, "greater than or equal to 1"),
        ({"attack": [{"name": "unsplit", "checkpoint_every": 9}]}, "unknown key of attack unsplit"),
        ({"attack": [{"name": "unsplit", "control": False}]}, "unknown key of attack unsplit"),
        ({"defense": [{"name": "weight-nose"}]}, "did you mean 'weight-noise'"),
        ({"defense": [{"name": "weight-noise", "scal": 1}]}, "did you mean 'scale'"),
        ({"sweep": {"model.cutt": [1]}}, "unknown dotted key 'model.cutt'; did you mean"),
        ({"sweep": {"model.cut": []}}, "has no values"),
        ({"case": [{"protocol.name": "fedavg"}]}, "needs a name"),
        (
            {"case": [{"name": "a", "protocol": {"nme": "fedavg"}}]},
            "of protocol fedavg 'nme'; did you mean 'name'",
        ),
        ({"gpus_per_worker": -0.5}, "gpus_per_worker\n  Input should be greater"),
        ({"protocol": {"rounds": 0}}, "greater than or equal to 1"),
        ({"protocol": {"local_steps": 10**11}}, "less than or equal to 1000000"),
        ({"data": {"public": 1.0}}, "less than 1"),
        ({"attack": []}, "at least 1"),
        ({"attack": [{"targets": 2}]}, "every attack needs a name; legal: "),
        ({"attack": [{"name": "unsplit", "outer_steps": "x"}]}, "outer_steps: Input should be a v"),
        ({"attack": [{"name": "unsplit", "tv": float("nan")}]}, "tv: Input should be a finite"),
        ({"attack": [{"name": "unsplit", "own": {"x": 1}}]}, "unknown key of attack unsplit 'x'"),
        ({"defense": [{"stack": 3}]}, "stack is 3; write a list"),
        ({"defense": [{"stack": [3]}]}, "3 is no defence"),
        ({"defense": [{"name": "smashed-noise", "sigma": "x"}]}, "sigma: Input should be a valid"),
        ({"sweep": {"seed": [0, -1]}}, "sweep: seed: Input should be greater than or equal to 0"),
        ({"sweep": {"model.cut": [1.5]}}, "sweep: model.cut: Input should be a valid integer"),
        ({"model": {"cut": ""}}, "String should have at least 1 character"),
        ({"sweep": {"attack.targets": [1]}}, "write one [[attack]] for each value"),
        ({"case": [{"name": "a", "data.nodes": 0}]}, "case 'a': data.nodes: Input should be gre"),
        ({"data": {"nodes": "2"}}, "Input should be a valid integer"),
        ({"data": {"nodes": True}}, "Input should be a valid integer"),
        ({"data": {"image_size": 100_000}}, "less than or equal to 1024"),
        ({"name": "../x"}, "cannot name a results folder"),
    ],
)
def test_refuses_what_is_not_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as error:
        settings(**changes)
    assert told in str(error.value)


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
    monkeypatch.setattr(plugins, "plugin_fields", lambda name: {**other, package: everyone}[name])
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


def test_a_case_may_nest_its_overrides() -> None:
    nested = settings(case=[{"name": "a", "protocol": {"name": "fedavg", "rounds": 2}}])
    dotted = settings(case=[{"name": "a", "protocol.name": "fedavg", "protocol.rounds": 2}])
    assert nested.case == dotted.case


def test_checking_settings_needs_no_torch() -> None:
    root = Path(__file__).parents[3]
    code = (
        "import sys; from experiments.settings.schema import Settings\n"
        "table = {'name': 'x', 'attack': [{'name': 'dlm', 'restarts': 2}]}\n"
        "protocol = {'name': 'parallel-split', 'sync': 'step'}\n"
        "Settings.model_validate({**table, 'protocol': protocol})\n"
        "print([m for m in ('torch', 'ray', 'torchvision', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603  our own interpreter on our own code
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cuda:1"}, "device = 'cuda:1': on grid = 'ray' a worker sees the GPU"),
        ({"device": "cuda", "gpus_per_worker": 0}, "gpus_per_worker = 0 leaves Ray's workers no"),
    ],
)
def test_a_device_that_rays_workers_cannot_have_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    table = {"name": "x", "grid": "ray", "attack": [{"name": "constant-image"}], **changes}
    with pytest.raises(ValueError, match=said):
        load_settings(table)
    load_settings({**table, "grid": "local"})
