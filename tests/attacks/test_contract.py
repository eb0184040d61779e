"""Every attack of the catalogue keeps the contract. A new attack needs no edit here."""

import ast
import copy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

import attacks
from attacks import ADVERSARIES, ATTACKS, INTRUDERS
from leakbed.contract_trials import attack_breaches
from leakbed.contracts import Attack, Guess, View
from tests.support.attack_views import quick_attack, view_for

NAMES = sorted(ATTACKS)


def same(first: Guess, second: Guess) -> bool:
    for field in fields(Guess):
        a, b = getattr(first, field.name), getattr(second, field.name)
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else [(a, b)]
        for x, y in pairs:
            if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
                return False
    return True


def tensors(view: View) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in vars(view).items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}{k}": v for k, v in parts.items() if isinstance(v, torch.Tensor)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits_and_the_view_is_not_changed(name: str) -> None:
    attack, view = quick_attack(name), view_for(quick_attack(name))
    before = copy.deepcopy(tensors(view))
    state = torch.get_rng_state()
    first = attack.run(view, seed=3)
    torch.rand(5)  # the global generator must not matter
    assert same(first, attack.run(view, seed=3))
    torch.set_rng_state(state)
    assert all(torch.equal(value, before[key]) for key, value in tensors(view).items())


@pytest.mark.parametrize("name", NAMES)
def test_there_is_a_guess_for_every_target(name: str) -> None:
    view = view_for(quick_attack(name))
    guess = quick_attack(name).run(view, seed=0)
    answers = (guess.images, guess.labels, guess.attributes)
    assert any(found is not None for found in (*answers, guess.adversarial))
    if guess.adversarial is not None:
        assert guess.adversarial.shape[:2] == (view.targets, len(guess.budgets or ()))
    for found in answers:
        assert found is None or found.shape[:2] == (view.targets, view.rows)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_of_a_strangers_attack_holds_of_the_catalogues(name: str) -> None:
    attack = quick_attack(name)
    assert attack_breaches(attack, view_for(attack)) == []


@pytest.mark.parametrize("name", NAMES)
def test_names_its_source_and_holds_settings_only(name: str) -> None:
    attack = quick_attack(name)
    assert isinstance(attack, Attack)
    assert attack.name == name
    assert "https://" in attack.source or "baseline" in attack.source
    assert attack.threat.in_words().endswith(".")
    for field in fields(attack):  # type: ignore[arg-type]  a frozen dataclass by contract
        with pytest.raises(FrozenInstanceError):
            setattr(attack, field.name, None)


def test_every_file_that_defines_an_attack_is_listed() -> None:
    folder = Path(attacks.__file__).parent
    defining = {
        path.stem
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "name"
        and node.value is not None
    }
    listed = [*ATTACKS.values(), *ADVERSARIES.values(), *INTRUDERS.values()]
    assert defining == {kind.__module__.rpartition(".")[2] for kind in listed}


@pytest.mark.parametrize("name", NAMES)
def test_a_key_is_the_attacks_own_name(name: str) -> None:
    assert ATTACKS[name].name == name
