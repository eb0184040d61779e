"""Events: exchanges decoded into arrays, each with node, round and step.

A hook of the wiretap gets one of these. Arrays are numpy, so that tapping needs no torch, and are
the hook's own copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]


class Phase(StrEnum):
    """Whether an exchange trains or only evaluates."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """One direction of one exchange.

    Attributes:
        node: The node's partition id where a roster is known, else Flower's node id.
        round: Server round, from 1; 0 if the message names none.
        step: Step within the round, from 0.
    """

    node: int
    round: int
    step: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightsDown(Event):
    """A model sent to a node for training or evaluation.

    Attributes:
        arrays: Weights and buffers by name.
        phase: What the node is asked to do with it.
    """

    arrays: Arrays
    phase: Phase = Phase.TRAIN


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateUp(Event):
    """A node's weights before and after its local training.

    Attributes:
        before: What the node received, by name.
        after: What it sent back, by name.
        examples: The ``num-examples`` it reported, if any.
    """

    before: Arrays
    after: Arrays
    examples: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SmashedUp(Event):
    """Activations at the cut, node to server.

    Attributes:
        smashed: One row per sample.
        labels: Their labels, where the protocol shares them.
        rows: The samples' ids at the node, where the protocol sends them.
        phase: Training batch or evaluation batch.
    """

    smashed: Array
    labels: Array | None = None
    rows: Array | None = None
    phase: Phase = Phase.TRAIN


@dataclass(frozen=True, kw_only=True, eq=False)
class CutGradientDown(Event):
    """The loss gradient at the cut, server to node.

    Attributes:
        gradient: Same shape as the smashed batch of the same node, round and step.
    """

    gradient: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Bottom(Event):
    """A bottom relayed through the server in the clear (``bottoms = "relayed"``).

    Attributes:
        arrays: Its weights and buffers by name.
        up: True from node to server.
    """

    arrays: Arrays
    up: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Sealed(Event):
    """A bottom that passes the server sealed: only its size is known.

    Attributes:
        size: Bytes.
        up: True from node to server.
    """

    size: int
    up: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreign(Event):
    """A message Leakbed has no words for.

    Attributes:
        message_type: Flower's message type.
        up: True from node to server.
        content: A copy of its records (a ``flwr.app.RecordDict``).
    """

    message_type: str
    up: bool
    content: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Failed(Event):
    """An exchange that brought an error, or no reply at all.

    Attributes:
        message_type: Flower's message type.
        reason: What the node or the grid said.
    """

    message_type: str
    reason: str


EVENT_TYPES: dict[str, type[Event]] = {
    "weights-down": WeightsDown,
    "update-up": UpdateUp,
    "smashed-up": SmashedUp,
    "cut-gradient-down": CutGradientDown,
    "bottom": Bottom,
    "sealed": Sealed,
    "failed": Failed,
}


def arrays_of(event: Event) -> dict[str, Arrays]:
    """Return an event's arrays by field; a single array is filed under its field's own name."""
    found: dict[str, Arrays] = {}
    for name, value in vars(event).items():
        if isinstance(value, np.ndarray):
            found[name] = {name: value}
        elif isinstance(value, Mapping):
            found[name] = value
    return found


def scalars_of(event: Event) -> dict[str, int | str | bool]:
    """Return an event's plain fields, in order."""
    return {
        name: value
        for name, value in vars(event).items()
        if isinstance(value, int | str | bool)  # enums of strings are strings
    }
