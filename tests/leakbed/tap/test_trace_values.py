"""What a message carries beside its arrays comes back from a trace as it was sent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from leakbed.events import Extras, Foreign, Records
from leakbed.tap.segments import TraceError
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.trace_values import LONGEST_TEXT, restored
from leakbed.wire.records import pack

X = np.arange(3, dtype=np.float32)
AT: dict[str, Any] = {"node": 1, "round": 2, "message_type": "query.x", "up": True}


def kept(folder: Path, content: RecordDict, kind: type[Records] = Foreign) -> Records:
    """Return an event of a message that was written and read."""
    with Recorder(folder / "trace") as recorder:
        recorder(kind(**AT, content=content))
    (found,) = Trace(folder / "trace").events()
    assert type(found) is kind
    return found


@pytest.mark.parametrize("kind", [Foreign, Extras])
def test_metrics_and_configurations_come_back(tmp_path: Path, kind: type[Records]) -> None:
    metrics = MetricRecord({"age_sum": 1234.5, "hist": [3, 1, 0], "many": list(range(2000))})
    config = ConfigRecord(
        {
            "masked": [b"masked vector", b"", b"\x00"],
            "key": b"bytes",
            "on": True,
            "word": "w\u00f6rd",
            "words": ["a", "b"],
            "none": [],
            "numbers": [0.5] * 1001,
            "large": [2**40] * 1001,
        }
    )
    content = RecordDict({"metrics": metrics, "config": config, "arrays": pack({"x": X})})
    found = kept(tmp_path, content, kind)
    assert found.content["metrics"] == metrics
    assert found.content["config"] == config
    assert np.array_equal(found.content["arrays"]["x"].numpy(), X)
    assert (found.skipped, found.size) == (None, None)
    blobs = [path.read_bytes() for path in (tmp_path / "trace/segments").iterdir()]
    assert any(b"masked vector" in blob for blob in blobs)


def test_arrays_of_other_types_are_skipped_by_name(tmp_path: Path) -> None:
    record = pack({"x": X})
    record["zipped"] = Array("int8", (4,), "mine.zip", b"abcd")
    words = ArrayRecord([np.array(["a", "bc"])])
    found = kept(tmp_path, RecordDict({"a": record, "names": words}))
    assert list(found.content) == ["a"]
    assert list(found.content["a"]) == ["x"]
    assert found.size == 4 + len(words["0"].data)
    assert found.skipped is not None
    assert found.skipped.startswith("a/zipped (int8 of mine.zip, 4 bytes), names/0 (<U2 of numpy")


def test_words_too_long_for_an_index_are_cut_and_said(tmp_path: Path) -> None:
    long = ConfigRecord({"prompt": "a" * (LONGEST_TEXT + 1)})
    many = ConfigRecord({f"{n}": "b" * LONGEST_TEXT for n in range(900)})
    found = kept(tmp_path, RecordDict({"long": long, "many": many}))
    assert found.content["long"]["prompt"] == "a" * LONGEST_TEXT
    assert "many" not in found.content
    assert found.skipped == (
        f"long/prompt (its end: {LONGEST_TEXT + 1} characters), many (900 values)"
    )


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"is": "metrics"},
        {"is": "arrays", "values": {}},
        {"is": "metrics", "values": {"a": "word"}},
        {"is": "metrics", "values": []},
        {"is": "config", "values": {"a": {"bytes": 1}}},
        {"is": "config", "values": {"a": None}},
        {"is": "config", "values": {"a": {"other": 1}}},
    ],
    ids=json.dumps,
)
def test_values_that_no_recorder_writes_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match="the values of 'r' are none: "):
        restored({"r": said}, {})


@pytest.mark.parametrize("lengths", [2, [1, 1], [4, -1], "abc", [None]], ids=str)
def test_bytes_of_other_lengths_are_refused(lengths: object) -> None:
    said = {"is": "config", "values": {"a": {"bytes": lengths}}}
    with pytest.raises(TraceError, match="the values of 'r' are none: "):
        restored({"r": said}, {"r": {"a": np.zeros(3, np.uint8)}})
