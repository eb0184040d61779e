"""Every adversary of the catalogue keeps the contract. A new one needs its view's shapes only."""

import copy
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import ADVERSARIES, ATTACKS
from leakbed.contracts import Adversary, Guess, Seat, View

NAMES = sorted(ADVERSARIES)
SHAPE, SMASHED, ROWS = (1, 8, 8), (3, 4, 4), 4
QUICK: dict[str, dict[str, Any]] = {"fsha": {"nets": "small"}, "fsha-property": {"nets": "small"}}

FENCE = """
import sys
import importlib.abc

FORBIDDEN = ("leakbed.data", "leakbed.oracle", "leakbed.wire", "leakbed.grids", "flwr", "ray")

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in FORBIDDEN or name.startswith(tuple(f + "." for f in FORBIDDEN)):
            raise ImportError(f"an adversary imported {name}")

sys.meta_path.insert(0, Refuse())
import runpy
module = runpy.run_path(sys.argv[1])
for name in module["NAMES"]:
    module["answers"](name)
    print(name)
"""


def quick(name: str) -> Adversary[Any]:
    return ADVERSARIES[name](**QUICK.get(name, {}))


def view() -> View:
    draw = torch.Generator().manual_seed(7)
    return View(
        seat=Seat.SERVER,
        image_shape=SHAPE,
        num_classes=3,
        targets=0,
        rows=ROWS,
        public_images=torch.rand(9, *SHAPE, generator=draw),
        public_labels=torch.arange(9) % 3,
        public_attributes=torch.arange(9) % 3,
        attribute_values=3,
        smashed_shape=SMASHED,
        device=torch.device("cpu"),
    )


def batch(seed: int) -> Tensor:
    return torch.randn(ROWS, *SMASHED, generator=torch.Generator().manual_seed(seed))


def answers(name: str, *, guessing: bool = False) -> list[Tensor]:
    """Three forged gradients, and what is guessed of a batch after them."""
    adversary = quick(name)
    state = adversary.begin(view(), seed=3)
    forged = []
    for step in range(3):
        state, gradient = adversary.forge(state, batch(step), batch(step + 10))
        forged.append(gradient)
        if guessing:
            adversary.guess(state, batch(20))
            torch.rand(5)  # the global generator must not matter either
    guess = adversary.guess(state, batch(20))
    return [*forged, *guessed(guess)]


def guessed(guess: Guess) -> list[Tensor]:
    found = guess.images, guess.labels, guess.attributes
    return [each for each in found if each is not None]


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


def test_no_name_is_both_an_attacks_and_an_adversarys() -> None:
    assert not ADVERSARIES.keys() & ATTACKS.keys()


def test_no_adversary_needs_data_or_flower() -> None:
    done = subprocess.run(  # noqa: S603  our own interpreter on our own code
        [sys.executable, "-c", FENCE, __file__],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == NAMES
