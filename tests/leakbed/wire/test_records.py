from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from leakbed.wire.records import (
    WireError,
    as_arrays,
    as_arrays_under,
    bottom_of,
    config_of,
    copy_records,
    count_bytes,
    int_field,
    pack,
    sole_arrays,
    unpack,
)

pytestmark = pytest.mark.usefixtures("identity")


ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3).T,
    "scalar": np.array(3),
    "empty": np.zeros((0, 2), dtype=np.float32),
    "half": np.ones(2, dtype=np.float16),
    "flags": np.array([True, False]),
}


def message(**records: object) -> Message:
    content = RecordDict({key.replace("_", "."): value for key, value in records.items()})
    return Message(content, dst_node_id=1, message_type="train.split")


def test_arrays_survive_the_wire_with_dtype_and_shape() -> None:
    found = unpack(pack(ARRAYS))
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


def test_unpacked_arrays_are_copies_that_may_be_written() -> None:
    record = pack(ARRAYS)
    unpack(record)["matrix"][:] = -1
    assert np.array_equal(unpack(record)["matrix"], ARRAYS["matrix"])


def test_objects_are_never_unpickled() -> None:
    bad = np.array([{}], dtype=object)
    with pytest.raises(WireError, match="an array of object cannot travel; send numbers"):
        pack({"bad": bad})
    buffer = BytesIO()
    np.save(buffer, bad, allow_pickle=True)
    hostile = WireArray("object", (1,), "numpy.ndarray", buffer.getvalue())
    with pytest.raises(WireError, match="array 'bad' is no NumPy array of numbers: shape"):
        unpack(ArrayRecord({"bad": hostile}))


@pytest.mark.parametrize("kind", ["M8[s]", "U2", "S3", ">f4", "longdouble", "f4,i4"])
def test_what_no_tensor_can_hold_is_no_array_of_numbers(kind: str) -> None:
    strange = ArrayRecord({"a": WireArray(np.zeros(2, dtype=kind))})
    with pytest.raises(WireError, match=r"array 'a' is no NumPy array of numbers: shape \(2,\) of"):
        as_arrays(strange)


def test_a_record_is_byte_for_byte_what_flower_makes() -> None:
    for name, array in ARRAYS.items():
        ours, flowers = pack({name: array})[name], WireArray(np.asarray(array, order="C"))
        assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
        assert ours.data == flowers.data


def test_what_flower_packs_is_read_with_its_own_order() -> None:
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    found = as_arrays(ArrayRecord({"a": WireArray(fortran)}))["a"]
    assert np.array_equal(found, fortran)


def test_views_are_the_records_own_bytes_and_cannot_be_written() -> None:
    record = pack(ARRAYS)
    seen = as_arrays(record)["matrix"]
    assert np.shares_memory(seen, np.frombuffer(record["matrix"].data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        seen[0, 0] = 1


def test_a_copy_of_records_shares_nothing_that_can_change() -> None:
    config = ConfigRecord({"list": [1, 2]})
    records = RecordDict({"a": pack(ARRAYS), "c": config, "m": MetricRecord({"x": 1})})
    copied = copy_records(records)
    copied["a"]["matrix"].data = b""  # type: ignore[index]
    copied["a"]["more"] = copied["a"]["half"]  # type: ignore[index]
    copied["c"]["list"].append(3)  # type: ignore[index]
    copied["m"]["x"] = 2  # type: ignore[index]
    del copied["m"]
    assert list(records) == ["a", "c", "m"]
    assert np.array_equal(unpack(records["a"])["matrix"], ARRAYS["matrix"])
    assert "more" not in records["a"]
    assert records["c"] == ConfigRecord({"list": [1, 2]})
    assert records["m"] == MetricRecord({"x": 1})


def test_bytes_are_those_of_the_arrays() -> None:
    one, two = pack({"x": np.zeros(10)}), pack({"y": np.zeros(20, dtype=np.float32)})
    counted = count_bytes(message(a=one, b=two, c=ConfigRecord({"not": "counted"})))
    assert counted == one.count_bytes() + two.count_bytes()
    assert 160 <= counted < 160 + 2 * 200  # the payload and two array headers
    assert count_bytes(message()) == 0
    assert count_bytes(Message(Error(0, "no"), reply_to=message())) == 0


def test_the_sole_record_of_arrays() -> None:
    record, config = pack({"x": np.zeros(1)}), ConfigRecord()
    assert sole_arrays(message(mine=record, c=config)) == "mine"
    assert sole_arrays(message(c=config)) is None
    assert sole_arrays(message(a=record, b=record)) is None
    assert sole_arrays(message(sealed_a=record)) is None


def test_a_bottom_says_how_it_travelled() -> None:
    record = pack({"w": np.ones(2)})
    for policy in ("sealed", "relayed"):
        arrays, found = bottom_of(message(**{f"{policy}_bottom": record}))
        assert found == policy
        assert arrays is not None
        assert arrays["w"].tolist() == [1, 1]
    assert bottom_of(message()) == (None, "sealed")


def test_what_is_missing_is_named_with_its_message() -> None:
    about = r"a 'train.split' message with records \['config'\]"
    lacking = message(config=MetricRecord())
    with pytest.raises(WireError, match=f"{about} needs a ConfigRecord under 'config'"):
        config_of(lacking)
    with pytest.raises(WireError, match=f"{about} needs an ArrayRecord under 'config'"):
        as_arrays_under(lacking, "config")
    assert as_arrays_under(lacking, "smashed") is None
    lacking = message(config=ConfigRecord({"step": "1"}))
    with pytest.raises(WireError, match=f"{about} needs a whole number 'step', got '1'"):
        int_field(lacking, config_of(lacking), "step")
    with pytest.raises(WireError, match="whole number 'round', got None"):
        int_field(lacking, config_of(lacking), "round")
    with pytest.raises(WireError, match="needs an array 'gradient' under 'g'"):
        as_arrays_under(message(g=ArrayRecord()), "g", needs="gradient")
