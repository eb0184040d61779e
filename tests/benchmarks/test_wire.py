"""Every message type is measured, and from 64 kB on costs at most 3 % over its tensors."""

import json

import numpy as np
import pytest

from benchmarks import wire
from leakbed.wire import messages, records

pytestmark = pytest.mark.usefixtures("identity")


def test_every_message_type_is_measured() -> None:
    types = {
        value for name, value in vars(messages).items() if name.isupper() and isinstance(value, str)
    }
    types = {kind for kind in types if kind.split(".")[0] in {"train", "evaluate", "query"}}
    # What travels in a protocol's own requests is each protocol's matter.
    types -= {messages.OWN_STEP, messages.OWN_EVALUATE}
    assert {case.kind for case in wire.cases(4096)} == types - messages.HARNESS


def test_every_record_of_arrays_is_measured() -> None:
    keys = {records.GRADIENT, records.SMASHED, records.FEATURES, records.UPPER_GRADIENT}
    keys |= {records.BOTTOM_GRADIENT, records.BOTTOMS["sealed"], "arrays"}
    assert {key for case in wire.cases(4096) for key in case.records.array_records} == keys


def test_tensor_bytes_are_those_of_the_tensors_alone() -> None:
    (batch,) = [case for case in wire.cases(4096) if case.what == "labelled batch"]
    assert batch.tensor_bytes == 4096 + 8 * wire.BATCH


@pytest.mark.parametrize("size", ["64 kB", "1 MB"])
@pytest.mark.parametrize("count", [wire.as_parcel, wire.as_protobuf])
def test_the_overhead_is_at_most_3_percent(count: wire.Count, size: str) -> None:
    over = {
        f"{case.kind} {case.what}": count(case.message()) / case.tensor_bytes
        for case in wire.cases(wire.SIZES[size])
    }
    assert {name: ratio for name, ratio in over.items() if not 1 < ratio <= 1.03} == {}


def test_the_deployment_sends_every_object_once() -> None:
    (case,) = [case for case in wire.cases(1 << 20) if case.what == "labelled batch"]
    arrays = case.records.array_records["smashed"]
    assert wire.as_objects(case.message()) > sum(len(array.data) for array in arrays.values())
    assert np.isfinite(wire.as_objects(case.message()))


def test_prints_one_line_per_wire_and_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SIZES", {"4 kB": 4096})
    wire.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"].split(",")[0] for line in lines] == [w.split(",")[0] for w in wire.WIRES]
    assert all(
        line["ratio"] == pytest.approx(line["ours"] / line["other"], rel=1e-3) for line in lines
    )
