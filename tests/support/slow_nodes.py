"""The project's own nodes, each answering after a random time; Ray's workers can import it."""

import random
import time
from math import prod

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from clients import fedavg, node, split, u_shaped
from leakbed.mods import defend

_chance = random.SystemRandom()  # takes nothing from the generators a training might use


def _late(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    reply = call_next(message, context)
    time.sleep(_chance.uniform(0, 0.002) * (int(context.node_config["partition-id"]) + 1))
    return reply


class ByName(ClientApp):
    """An app that Flower's simulation sends to its workers by name.

    By value, it would send handlers that are wrapped in type checks under pytest, and cannot be.
    """

    def __reduce__(self) -> str:
        return "app"


app = ByName(mods=[_late, defend(node.cell_defenses)])
for family in (node, fedavg, split, u_shaped):
    family.register(app)


def stateful() -> nn.Sequential:
    """BatchNorm and dropout on both sides of cut 3."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(12, 3),
    )


def dense(image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Dropout and BatchNorm on both sides of cut 3, for images of any shape."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(image_shape), 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.BatchNorm1d(8),
        nn.Dropout(0.25),
        nn.Linear(8, 3),
    )


def apart() -> nn.Sequential:
    """No BatchNorm below cut 3, where a clip needs each sample's own row."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.Dropout(0.25),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(12, 3),
    )
