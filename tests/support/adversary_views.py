"""Small settings, a view and batches for every adversary of the catalogue."""

from typing import Any

import torch
from torch import Tensor

from attacks import ADVERSARIES
from leakbed.contracts import Adversary, Guess, Seat, View

SHAPE, SMASHED, ROWS = (1, 8, 8), (3, 4, 4), 4
QUICK: dict[str, dict[str, Any]] = {"fsha": {"nets": "small"}, "fsha-property": {"nets": "small"}}


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
