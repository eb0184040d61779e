"""Small settings, a view and gradients for every intruder of the catalogue."""

from typing import Any

import torch
from torch import Tensor

from attacks import INTRUDERS
from leakbed.contracts.attack import MaliciousClient, MaliciousClientState, NodeView

SHAPE, ROWS, CYCLE = (1, 8, 8), 4, 5
QUICK: dict[str, dict[str, Any]] = {"client-gan": {"width": 4, "latent": 3}}


def quick(name: str) -> MaliciousClient:
    return INTRUDERS[name](**QUICK.get(name, {}))


def view() -> NodeView:
    return NodeView(image_shape=SHAPE, num_classes=3, outputs=4, device=torch.device("cpu"))


def gradient(step: int) -> Tensor:
    return torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(step))


def played(name: str, *, looking: bool = False) -> tuple[list[Tensor], MaliciousClientState]:
    """What an intruder showed the network in some turns, its samples after them, and its state."""
    intruder = quick(name)
    state = intruder.begin(view(), seed=3)
    shown = []
    for step in range(CYCLE):
        if looking:
            intruder.turn(view(), state, rows=ROWS)
            intruder.samples(view(), state, count=2)
            torch.rand(5)  # the global generator must not matter either
        turn = intruder.turn(view(), state, rows=ROWS)
        images = turn.images
        if images is not None:
            shown.append(images.detach())
        state = intruder.learn(state, turn, None if images is None else gradient(step))
    return [*shown, intruder.samples(view(), state, count=2)], state
