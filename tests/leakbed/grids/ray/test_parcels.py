from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.grids.ray.parcels import (
    TypedCall,
    metadata_of,
    metadata_values,
    opened,
    packed,
    restored,
    seal,
)
from leakbed.wire.messages import SPLIT_STEP, SplitRequest
from leakbed.wire.records import Buffer, ReceivedArray
from tests.support.strange_nodes import message

pytestmark = pytest.mark.usefixtures("identity")

SMALL, LARGE = np.arange(3.0), np.arange(100_000, dtype=np.float32)


def records() -> RecordDict:
    return RecordDict(
        {
            "weights": ArrayRecord(
                {"w": Array(LARGE), "b": Array(SMALL), "none": Array(SMALL[:0])}
            ),
            "config": ConfigRecord({"round": 3, "names": ["a", "b"], "raw": b"\0\xff", "on": True}),
            "empty": ArrayRecord(),
            "metrics": MetricRecord({"loss": 0.1, "each": [1, 2]}),
        }
    )


def travelled(sent: RecordDict) -> RecordDict:
    return restored(opened(seal(packed(sent))))[0]


def test_records_come_out_as_they_went_in() -> None:
    sent = records()
    came = travelled(sent)
    assert came == sent
    assert sent == came
    assert list(came) == list(sent)
    assert [type(record) for record in came.values()] == [type(r) for r in sent.values()]
    for name, array in came.array_records["weights"].items():
        assert np.array_equal(array.numpy(), sent.array_records["weights"][name].numpy())
        assert array.numpy().flags.writeable  # as Flower's own


def test_what_is_received_shares_nothing_mutable_with_what_was_sent() -> None:
    sent = records()
    came = travelled(sent)
    came.config_records["config"]["names"].append("c")  # type: ignore[union-attr]
    came.array_records["weights"].clear()
    assert sent == records()


def test_large_arrays_travel_as_they_lie_and_are_read_where_they_arrive() -> None:
    sent = records()
    weights = sent.array_records["weights"]
    said, *own = seal(packed(sent))
    assert [buffer.ctypes.data for buffer in own] == [address(weights["w"].data)]
    assert LARGE[:4].tobytes() not in said
    _, (first, *_) = opened((said, *own))
    assert address(first) == address(weights["w"].data)


def test_a_small_parcel_is_one_pickle() -> None:
    (said,) = seal(packed(RecordDict({"small": ArrayRecord({"b": Array(SMALL)})})))
    assert SMALL.tobytes() in said


def test_a_calls_arrays_travel_beside_the_pickle_as_a_messages_do() -> None:
    call = TypedCall(1, SPLIT_STEP, SplitRequest(round=1, step=1, gradient=LARGE).handed_over())
    said, own = seal(call)
    assert own.nbytes == LARGE.nbytes
    came = opened((said, own))
    assert (came.node, came.kind, came.request.step) == (1, SPLIT_STEP, 1)
    assert np.array_equal(came.request.gradient, LARGE)
    with pytest.raises(ValueError, match="read-only"):
        came.request.gradient += 1


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_arrived_cannot_be_written(size: int) -> None:
    array = RecordDict({"x": ArrayRecord({"x": Array(np.zeros(size, np.uint8))})})
    came = travelled(array).array_records["x"]["x"]
    assert isinstance(came, ReceivedArray)
    with pytest.raises(TypeError, match="read-only"):
        came.buffer[0] = 1


def test_a_record_of_no_kind_of_flowers_is_refused() -> None:
    strange = records()
    strange.__dict__["_data"]["odd"] = object()
    with pytest.raises(TypeError, match="record 'odd' is a object, which cannot travel"):
        packed(strange)


def test_metadata_come_out_as_they_went_in() -> None:
    sent = message(3, "count")
    reply = Message(RecordDict(), reply_to=sent)
    for each in (sent, reply):
        assert vars(metadata_of(metadata_values(each))) == {
            k: v for k, v in vars(each.metadata).items() if k != "_delivered_at"
        }


def address(buffer: Buffer) -> Any:
    return np.frombuffer(buffer, np.uint8).ctypes.data
