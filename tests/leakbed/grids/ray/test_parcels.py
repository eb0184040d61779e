import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.grids.ray.parcels import (
    INLINE_BYTES,
    metadata_of,
    metadata_values,
    opened,
    outlined,
    restored,
    seal,
)
from leakbed.wire.records import Buffer, ReceivedArray
from tests.support.strange_nodes import message

pytestmark = pytest.mark.usefixtures("identity")

SMALL, LARGE = np.arange(3.0), np.arange(INLINE_BYTES, dtype=np.float32)


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
    outline, buffers = opened(seal(*outlined(sent)))
    return restored(outline, iter(buffers))


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


def test_no_byte_of_a_tensor_goes_through_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled: list[bytes] = []
    dumps = pickle.dumps

    def recorded(value: object, protocol: int) -> bytes:
        pickled.append(dumps(value, protocol=protocol))
        return pickled[-1]

    monkeypatch.setattr(pickle, "dumps", recorded)
    seal(*outlined(records()))
    seal(*outlined(RecordDict({"small": ArrayRecord({"b": Array(SMALL)})})))
    assert len(pickled) == 2
    assert not any(SMALL.tobytes() in said or LARGE[:4].tobytes() in said for said in pickled)


def test_large_arrays_travel_as_they_lie_and_are_read_where_they_arrive() -> None:
    sent = records()
    weights = sent.array_records["weights"]
    _, *own = seal(*outlined(sent))
    assert [buffer.ctypes.data for buffer in own] == [address(weights["w"].data)]
    _, views = opened(seal(*outlined(sent)))
    assert address(views[0]) == address(weights["w"].data)


def test_a_small_parcel_is_one_bytes_object_and_read_where_it_lies() -> None:
    parcel = seal("said", [b"a" * 100, b"", b"b" * 7])
    assert isinstance(parcel, bytes)
    said, views = opened(parcel)
    assert (said, [bytes(view) for view in views]) == ("said", [b"a" * 100, b"", b"b" * 7])
    inside = [address(view) - address(parcel) for view in views if view.nbytes]
    assert all(0 < place < len(parcel) for place in inside)
    assert all(place % 16 == 0 for place in inside)


@pytest.mark.parametrize("size", [100, INLINE_BYTES + 1])
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
        outlined(strange)


def test_metadata_come_out_as_they_went_in() -> None:
    sent = message(3, "count")
    reply = Message(RecordDict(), reply_to=sent)
    for each in (sent, reply):
        assert vars(metadata_of(metadata_values(each))) == {
            k: v for k, v in vars(each.metadata).items() if k != "_delivered_at"
        }


def address(buffer: Buffer) -> Any:
    return np.frombuffer(buffer, np.uint8).ctypes.data
