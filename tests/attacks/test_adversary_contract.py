"""Every adversary of the catalogue keeps the contract. A new one needs its view's shapes only."""

import copy
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from attacks import ADVERSARIES
from leakbed.contracts import Adversary
from tests.support.adversary_views import answers, batch, guessed, quick, view

NAMES = sorted(ADVERSARIES)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits_whatever_is_guessed_between(name: str) -> None:
    first, again = answers(name), answers(name, guessing=True)
    assert len(first) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_given_is_changed_and_nothing_sent_is_written_again(name: str) -> None:
    adversary, granted = quick(name), view()
    before = copy.deepcopy(granted.public_images)
    assert before is not None
    process = torch.get_rng_state()
    state = adversary.begin(granted, seed=3)
    given, honest = batch(0), batch(1)
    kept = given.clone(), honest.clone()
    state, forged = adversary.forge(state, given, honest)
    sent = forged.clone()
    state, _ = adversary.forge(state, batch(2), batch(3))
    adversary.guess(state, given)
    assert torch.equal(given, kept[0])
    assert torch.equal(honest, kept[1])
    assert torch.equal(forged, sent)
    assert not forged.requires_grad
    assert torch.equal(before, granted.public_images)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), process)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_has_the_shape_and_type_of_its_batch_and_every_row_a_guess(name: str) -> None:
    adversary = quick(name)
    state, forged = adversary.forge(adversary.begin(view(), seed=3), batch(0), batch(1))
    assert (forged.shape, forged.dtype) == (batch(0).shape, batch(0).dtype)
    guess = adversary.guess(state, batch(0)[:3])
    found = guessed(guess)
    assert found
    assert all(each.shape[:2] == (3, 1) for each in found)


@pytest.mark.parametrize("name", NAMES)
def test_names_its_source_and_holds_settings_only(name: str) -> None:
    adversary = quick(name)
    assert isinstance(adversary, Adversary)
    assert ADVERSARIES[name].name == adversary.name == name
    assert "https://" in adversary.source
    assert adversary.threat.active
    for field in fields(adversary):  # type: ignore[arg-type]  a frozen dataclass by contract
        with pytest.raises(FrozenInstanceError):
            setattr(adversary, field.name, None)
