"""Somebody else's Flower app, its messages, and a hook that tries to do harm."""

import random
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.events import (
    Event,
    Foreign,
    arrays_of,
)
from leakbed.grids import LocalGrid
from leakbed.wire.messages import SplitReply, SplitRequest
from leakbed.wire.records import pack, unpack

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def stranger() -> ClientApp:
    """Somebody's app: adds one to its weights, squares its query, fails or is silent on demand."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if "fail" in message.content:
            raise RuntimeError("disk full")
        weights = {k: v + 1 for k, v in unpack(message.content["arrays"]).items()}
        return Message(RecordDict({"arrays": pack(weights)}), reply_to=message)

    @app.query("square")
    def square(message: Message, context: Context) -> Message:
        squared = {k: v**2 for k, v in unpack(message.content["in"]).items()}
        return Message(RecordDict({"out": pack(squared)}), reply_to=message)

    @app.train("split")
    def split(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        smashed = X if request.gradient is None else request.gradient
        return Message(SplitReply(steps=9, examples=2, smashed=smashed).records(), reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def grid(nodes: int = 2) -> LocalGrid:
    return LocalGrid(stranger(), nodes=nodes)


def train(node: int = 1, *, value: float = 0.0, **records: Any) -> Message:
    content = {"arrays": pack({"w": X + value}), "config": ConfigRecord({"server-round": 1})}
    return Message(RecordDict(content | records), dst_node_id=node, message_type="train")


def square(node: int = 1) -> Message:
    return Message(
        RecordDict({"in": pack({"x": X})}), dst_node_id=node, message_type="query.square"
    )


def split(*, step: int = 1) -> Message:
    request = SplitRequest(round=1, step=step, gradient=X if step else None)
    return Message(request.records(), dst_node_id=1, message_type="train.split")


def out(reply: Message, key: str = "arrays", name: str = "w") -> Any:
    return unpack(reply.content.array_records[key])[name]


def mutate(event: Event) -> None:
    """Do everything to an event that a hook must not be able to do to the training."""
    if isinstance(event, Foreign):
        for record in event.content.values():
            record.clear()
        event.content.clear()
    for group in arrays_of(event).values():
        for array in group.values():
            array[...] = -7
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    torch.manual_seed(3)
