"""Bytes on the wire against the tensors' own: every message type, on three wires.

Flower's message is its protobuf, ``flwr.common.serde``. Flower's deployment cuts a message into
objects and sends each in a request of its own; all of these requests are counted. RayGrid's parcel
is what its processes hand each other. A line gives the message that is worst on its wire.

Run alone with ``python -m benchmarks.wire``, or by ``make bench``. One JSON object a line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from benchmarks.paired import line, show
from leakbed.events import Array, Arrays
from leakbed.flower_internals import set_message_id, task_identity, with_content
from leakbed.grids.ray.parcels import prepared
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    WEIGHTS,
    WEIGHTS_EVALUATE,
    BackwardReply,
    EvaluateRequest,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import CONFIG, METRICS, ROUND, pack

SIZES = {"4 kB": 4 << 10, "64 kB": 64 << 10, "1 MB": 1 << 20}
BATCH = 64
Count = Callable[[Message], int]
_NODE, _RUN, _ID = (1 << 63) - 1, (1 << 63) - 1, "0" * 64  # as long as Flower's own


@dataclass(frozen=True)
class Case:
    """One message that carries tensors.

    Attributes:
        kind: Its type.
        what: What tells it from others of its type.
        records: What it carries.
    """

    kind: str
    what: str
    records: RecordDict

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        arrays = self.records.array_records.values()
        return sum(array.numpy().nbytes for record in arrays for array in record.values())

    def message(self) -> Message:
        """Return the message, as it is sent."""
        message = Message(RecordDict(), dst_node_id=_NODE, message_type=self.kind)
        set_message_id(message, _ID)
        return with_content(message, self.records)


def cases(size: int) -> Iterator[Case]:
    """Yield every message that carries tensors, as strategies and clients make it.

    Args:
        size: Bytes of the largest tensor.

    Yields:
        Requests and replies of every type.
    """
    draw = np.random.default_rng(0)
    rows: Array = draw.random((BATCH, size // 4 // BATCH), np.float32)
    ids: Array = draw.integers(0, 1 << 40, BATCH)
    bottom: Arrays = {"0.weight": rows, "0.bias": draw.random(BATCH, np.float32)}
    whole: ArrayRecord = pack(bottom)
    config = ConfigRecord({ROUND: 1})
    metrics = MetricRecord({"num-examples": 320, "train-loss": 0.5})
    yield Case(WEIGHTS, "weights", RecordDict({"arrays": whole, CONFIG: config}))
    yield Case(WEIGHTS, "update", RecordDict({"arrays": whole, METRICS: metrics}))
    yield Case(WEIGHTS_EVALUATE, "weights", RecordDict({"arrays": whole, CONFIG: config}))
    test: dict[str, Any] = {"round": 1, "start": 0, "stop": 256}
    for kind, what, message in (
        (SPLIT_STEP, "bottom", SplitRequest(round=1, step=0, bottom=bottom)),
        (SPLIT_STEP, "gradient", SplitRequest(round=1, step=1, gradient=rows)),
        (SPLIT_STEP, "labelled batch", SplitReply(steps=5, examples=320, smashed=rows, labels=ids)),
        (SPLIT_STEP, "numbered batch", SplitReply(steps=5, examples=320, smashed=rows, rows=ids)),
        (SPLIT_STEP, "closing bottom", SplitReply(steps=5, examples=320, bottom=bottom)),
        (SPLIT_EVALUATE, "bottom", EvaluateRequest(**test, bottom=bottom)),
        (SPLIT_EVALUATE, "batch", SplitReply(steps=0, examples=256, smashed=rows)),
        (HEAD_STEP, "features", HeadRequest(round=1, step=0, features=rows)),
        (HEAD_STEP, "gradient", HeadReply(step=0, gradient=rows)),
        (HEAD_EVALUATE, "features", HeadEvaluateRequest(**test, features=rows, bottom=bottom)),
        (BACKWARD_STEP, "gradient", SplitRequest(round=1, step=1, gradient=rows)),
        (BACKWARD_STEP, "bottom's gradient", BackwardReply(step=0, gradient=bottom)),
    ):
        yield Case(kind, what, message.records())


def as_protobuf(message: Message) -> int:
    """Return the bytes of a message as one protobuf."""
    return int(message_to_proto(message).ByteSize())


def as_objects(message: Message) -> int:
    """Return the bytes of all requests by which Flower's deployment pushes a message."""
    bare = message_to_proto(with_content(message, RecordDict()))
    bare.ClearField("content")
    trees = [get_object_tree(message)]
    total = PushAppMessagesRequest(messages_list=[bare], message_object_trees=trees).ByteSize()
    for name, part in get_all_nested_objects(message).items():
        total += PushObjectRequest(
            node=Node(node_id=_NODE),
            run_id=_RUN,
            object_id=name,
            object_content=part.deflate(),
            session_id=_ID[:36],
        ).ByteSize()
    return int(total)


def as_parcel(message: Message) -> int:
    """Return the bytes of a message to a RayGrid's node, pickle and buffers."""
    said, *buffers = prepared(message)
    return len(said) + sum(buffer.nbytes for buffer in buffers)


WIRES: dict[str, Count] = {
    "RayGrid's parcel": as_parcel,
    "Flower's protobuf": as_protobuf,
    "Flower's deployment, all requests": as_objects,
}


def measured(label: str) -> Iterator[dict[str, object]]:
    """Yield one line per wire.

    Args:
        label: A key of ``SIZES``.

    Yields:
        The message with the largest overhead.
    """
    found = list(cases(SIZES[label]))
    for wire, count in WIRES.items():
        ours, case = max(
            ((count(case.message()), case) for case in found),
            key=lambda pair: pair[0] / pair[1].tensor_bytes,
        )
        name = f"{wire}, {label} tensor, worst ({case.kind}, {case.what}): message / tensors"
        yield line(name, [(ours, case.tensor_bytes)], unit="bytes")


def main() -> None:
    """Measure every size and print the lines."""
    with task_identity():
        for label in SIZES:
            for result in measured(label):
                show(result)


if __name__ == "__main__":
    main()
