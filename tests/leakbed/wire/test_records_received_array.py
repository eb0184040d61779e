import copy
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from leakbed.wire.records import Buffer, ReceivedArray, buffer_of

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def received(values: np.ndarray = VALUES) -> ReceivedArray:
    """An array whose bytes lie in the middle of something larger."""
    sent = Array(values)
    larger = memoryview(b"x" * 64 + sent.data + b"x" * 64)
    return ReceivedArray(sent.dtype, tuple(sent.shape), sent.stype, larger[64:-64])


def address(buffer: Buffer) -> int:
    place: int = np.frombuffer(buffer, np.uint8).ctypes.data
    return place


@pytest.mark.parametrize("values", [VALUES, np.asfortranarray(VALUES), VALUES[:0], np.float64(3)])
def test_its_values_are_those_sent_and_may_be_written(values: np.ndarray) -> None:
    came = received(np.asarray(values)).numpy()
    assert np.array_equal(came, values)
    assert came.dtype == values.dtype
    assert came.flags.writeable


def test_a_received_array_is_flowers_wherever_flower_wants_one() -> None:
    sent = Array(VALUES)
    came = received()
    assert ArrayRecord({"again": came})["again"] == sent
    for copied in (copy.deepcopy(came), pickle.loads(pickle.dumps(came))):  # noqa: S301
        assert type(copied) is Array
        assert copied == sent
    assert came.object_id == sent.object_id
    assert [chunk for chunk, _ in came.slice_array()] == [chunk for chunk, _ in sent.slice_array()]
    assert isinstance(came.data, bytes)
    assert came.data is came.data  # copied once
    assert address(came.buffer) == address(came.data)


def test_a_shallow_copy_shares_the_bytes_and_nothing_else() -> None:
    came = received()
    twin = copy.copy(came)
    twin.data = b"other"
    assert (came == twin, came != twin) == (False, True)
    assert bytes(buffer_of(twin)) == b"other"
    assert came == Array(VALUES)
    assert came != "something else"
