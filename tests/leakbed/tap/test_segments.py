"""Traces from strangers: a TraceError for whatever no recorder writes, and no file outside read."""

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import save

from leakbed.events import Event, Foreign, SmashedUp, UpdateUp, WeightsDown
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.trace_index import LONGEST_LINE, TraceError
from leakbed.wire.records import pack
from tests.support.mutating import VALUES, mutated

X = np.arange(6, dtype=np.float32).reshape(2, 3)
HEADER: dict[str, Any] = {"format": "leakbed-trace", "version": 2, "about": {}}
STORED = save({"smashed": X})
DIGEST = hashlib.sha256(STORED).hexdigest()
SEGMENT = "segments/000000.bin"
PLACE = [DIGEST, 0, 0, len(STORED)]
SMASHED: dict[str, Any] = {
    "number": 0,
    "kind": "smashed-up",
    "node": 0,
    "round": 1,
    "step": 0,
    "phase": "train",
    "arrays": {"smashed": PLACE},
}
HOLDING: dict[str, Any] = {
    "number": 0,
    "kind": "holding",
    "seat": "server",
    "name": "top",
    "arrays": {"held": PLACE},
}
FAILED: dict[str, Any] = {
    "number": 0,
    "kind": "failed",
    "node": 0,
    "round": 1,
    "step": 0,
    "message_type": "train",
    "reason": "",
    "arrays": {},
}


def written(folder: Path, *lines: dict[str, Any] | bytes, stored: bytes = STORED) -> Path:
    """Write a trace whose checksums all fit, and its one segment."""
    (folder / "segments").mkdir(parents=True, exist_ok=True)
    (folder / SEGMENT).write_bytes(stored)
    index = b""
    for line in lines:
        chained = (
            line
            if isinstance(line, bytes)
            else json.dumps({**line, "before": hashlib.sha256(index).hexdigest()}).encode()
        )
        index += chained + b"\n"
    (folder / "index.jsonl").write_bytes(index)
    return folder


def read(folder: Path) -> list[Event]:
    """Open a trace and read all of it."""
    trace = Trace(folder)
    for record in trace.records:
        if record.kind == "holding":
            trace.holding(record.fields["seat"], record.fields["name"])
    return list(trace.events())


def without(line: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def test_what_a_recorder_writes_is_read(tmp_path: Path) -> None:
    end = {"end": 3}
    lines = (HEADER, SMASHED, {**HOLDING, "number": 1}, {**FAILED, "number": 2}, end)
    assert len(read(written(tmp_path, *lines))) == 2


INDEXES: dict[str, tuple[dict[str, Any] | bytes, ...]] = {
    "no about": (without(HEADER, "about"), {"end": 0}),
    "about is a list": ({**HEADER, "about": [1]}, {"end": 0}),
    "no kind": (HEADER, without(FAILED, "kind"), {"end": 1}),
    "kind is a list": (HEADER, {**FAILED, "kind": []}, {"end": 1}),
    "unknown kind": (HEADER, {**FAILED, "kind": "x"}, {"end": 1}),
    "no arrays": (HEADER, without(FAILED, "arrays"), {"end": 1}),
    "arrays is a list": (HEADER, {**FAILED, "arrays": [1]}, {"end": 1}),
    "unknown field": (HEADER, {**FAILED, "what": 1}, {"end": 1}),
    "unknown arrays": (HEADER, {**FAILED, "arrays": {"smashed": PLACE}}, {"end": 1}),
    "missing field": (HEADER, without(FAILED, "reason"), {"end": 1}),
    "missing array": (HEADER, {**SMASHED, "arrays": {}}, {"end": 1}),
    "array as a field": (HEADER, {**SMASHED, "smashed": 1, "arrays": {}}, {"end": 1}),
    "unknown phase": (HEADER, {**SMASHED, "phase": "x"}, {"end": 1}),
    "phase is a table": (HEADER, {**SMASHED, "phase": {}}, {"end": 1}),
    "node is a name": (HEADER, {**SMASHED, "node": "x"}, {"end": 1}),
    "node is true": (HEADER, {**SMASHED, "node": True}, {"end": 1}),
    "number is true": (HEADER, FAILED, {**FAILED, "number": True}, {"end": 2}),
    "end among the records": (HEADER, {"end": 0}, {"end": 1}),
    "place is a number": (HEADER, {**SMASHED, "arrays": {"smashed": 7}}, {"end": 1}),
    "place is a digest alone": (HEADER, {**SMASHED, "arrays": {"smashed": DIGEST}}, {"end": 1}),
    **{
        f"place is {place}": (HEADER, {**SMASHED, "arrays": {"smashed": place}}, {"end": 1})
        for place in (
            ["a\0b", *PLACE[1:]],
            ["../elsewhere", *PLACE[1:]],
            [DIGEST, "../../outside", 0, len(STORED)],
            [DIGEST, -1, 0, len(STORED)],
            [DIGEST, 1, 0, len(STORED)],
            [DIGEST, 10**6, 0, len(STORED)],
            [DIGEST, False, 0, len(STORED)],
            [DIGEST, 0, -8, len(STORED)],
            [DIGEST, 0, 8, len(STORED) - 8],
            [DIGEST, 0, 8, len(STORED)],
            [DIGEST, 0, 0, len(STORED) + 1],
            [DIGEST, 0, 0, len(STORED) - 1],
            [DIGEST, 0, 0, 0],
            [DIGEST, 0, 0, -1],
            [DIGEST, 0, 0, 10**30],
            [DIGEST, 0, 10**30, len(STORED)],
            [DIGEST, 0, 0, float(len(STORED))],
            [*PLACE, 0],
        )
    },
    "array of another field": (
        HEADER,
        {**SMASHED, "arrays": {"smashed": PLACE, "labels": PLACE}},
        {"end": 1},
    ),
    "holding of no name": (HEADER, without(HOLDING, "name"), {"end": 1}),
    "holding with two groups": (HEADER, {**HOLDING, "arrays": {"held": PLACE, "x": PLACE}}),
    "holding with another group": (HEADER, {**HOLDING, "arrays": {"top": PLACE}}),
    "deep nesting": (HEADER, b"[" * 200_000),
    "deep nesting in a record": (HEADER, b'{"number":0,"x":' + b'{"a":' * 200_000),
    "a number of 10,000 digits": (HEADER, b'{"number":' + b"9" * 10_000 + b"}"),
    "only a header": (HEADER,),
    "empty": (),
    "no JSON": (b"\xff\xfe",),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_no_recorder_writes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError):
        read(written(tmp_path, *INDEXES[name]))


@pytest.mark.parametrize(
    ("seat", "name"), [("server", "../../../outside"), ("..", "/outside"), ("", "a\0b\n")]
)
def test_a_holding_lies_in_the_trace_whatever_it_is_called(
    tmp_path: Path, seat: str, name: str
) -> None:
    with Recorder(tmp_path / "trace") as recorder:
        recorder.hold(seat, name, {"x": X})
    held = Trace(tmp_path / "trace").holding(seat, name)
    assert held is not None
    np.testing.assert_array_equal(held["x"], X)
    assert sorted(path.name for path in (tmp_path / "trace").rglob("*") if path.is_file()) == [
        "000000.bin",
        "index.jsonl",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize("linked", ["segments", SEGMENT, "index.jsonl"])
def test_links_in_a_trace_are_not_followed(tmp_path: Path, linked: str) -> None:
    folder = written(tmp_path / "trace", HEADER, SMASHED, {**HOLDING, "number": 1}, {"end": 2})
    read(folder)
    (folder / linked).rename(tmp_path / "elsewhere")
    (folder / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TraceError):
        read(folder)


def test_a_trace_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path / "trace", HEADER, SMASHED, {"end": 1}))
    assert len(read(tmp_path / "link")) == 1


def test_a_pipe_in_a_trace_does_not_hold_the_reader(tmp_path: Path) -> None:
    folder = written(tmp_path, HEADER, SMASHED, {"end": 1})
    (folder / SEGMENT).unlink()
    os.mkfifo(folder / SEGMENT)
    with pytest.raises(TraceError, match="is missing its file"):
        read(folder)


def tensors(**about: Any) -> bytes:
    header = json.dumps({"smashed": about}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0\0"


BLOBS = {
    "no safetensors": b"\xff" * 64,
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of nothing": b"\0" * 8,
    "header is a list": (2).to_bytes(8, "little") + b"[]",
    "deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "bfloat16": tensors(dtype="BF16", shape=[1], data_offsets=[0, 2]),
    "no such type": tensors(dtype="X", shape=[1], data_offsets=[0, 2]),
    "negative shape": tensors(dtype="I8", shape=[-1, -2], data_offsets=[0, 2]),
    "other offsets": tensors(dtype="I8", shape=[2], data_offsets=[1, 3]),
    "no offsets": tensors(dtype="I8", shape=[2]),
    "too long": save({"smashed": X}) + b"\0",
    "another name": save({"labels": X}),
}


@pytest.mark.parametrize("name", BLOBS)
def test_arrays_that_no_recorder_writes_are_refused(tmp_path: Path, name: str) -> None:
    stored = BLOBS[name]
    place = [hashlib.sha256(stored).hexdigest(), 0, 0, len(stored)]
    line = {**SMASHED, "arrays": {"smashed": place}}
    with pytest.raises(TraceError, match="record 0"):
        read(written(tmp_path, HEADER, line, {"end": 1}, stored=stored))


@pytest.mark.parametrize("inside", [SEGMENT, "index.jsonl"])
def test_a_sparse_file_costs_no_memory(tmp_path: Path, inside: str) -> None:
    line = {**SMASHED, "arrays": {"smashed": [DIGEST, 0, 0, 3 << 30]}}
    folder = written(tmp_path, HEADER, line if inside == SEGMENT else SMASHED, {"end": 1})
    with (folder / inside).open("r+b") as file:
        file.truncate(3 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(TraceError):
            Trace(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (2.5 * LONGEST_LINE if inside == "index.jsonl" else 1 << 20)


def unstorable() -> dict[str, dict[str, Any]]:
    return {
        "metadata": {"__metadata__": X},
        "complex": {"w": X.astype(np.complex128)},
        "long": {"w": X.astype(np.longdouble)},
        "objects": {"w": np.array([{}], dtype=object)},
        "words": {"w": np.array(["a"])},
        "surrogate": {"\ud800": X},
    }


@pytest.mark.parametrize("name", unstorable())
def test_arrays_that_cannot_be_stored_cost_their_own_record_alone(
    tmp_path: Path, name: str
) -> None:
    arrays = unstorable()[name]
    good = SmashedUp(node=0, round=1, smashed=X)
    with Recorder(tmp_path / "trace") as recorder:
        recorder(good)
        recorder(UpdateUp(node=1, round=2, step=3, before={"w": X}, after=arrays))
        recorder(WeightsDown(node=1, round=2, arrays=arrays))
        recorder(good)
    first, up, down, last = Trace(tmp_path / "trace").events()
    assert isinstance(first, SmashedUp)
    assert isinstance(last, SmashedUp)
    assert isinstance(up, Foreign)
    assert isinstance(down, Foreign)
    assert (up.node, up.round, up.step, up.message_type, up.up) == (1, 2, 3, "update-up", True)
    size = sum(array.nbytes for array in arrays.values())
    assert (up.size, down.size, down.up) == (X.nbytes + size, size, False)
    assert not up.content
    assert (tmp_path / "trace" / SEGMENT).stat().st_size == len(STORED)  # the good ones are equal


def test_a_foreign_message_of_strange_arrays_is_kept_by_its_size(tmp_path: Path) -> None:
    strange = ArrayRecord({"t": Array("int8", (2,), "torch.tensor", b"ab")})
    metadata = RecordDict({"a": pack({"__metadata__": X})})
    with Recorder(tmp_path / "trace") as recorder:
        for content in (RecordDict({"a": strange}), metadata):
            recorder(Foreign(node=0, round=0, message_type="query.x", up=False, content=content))
    one, two = Trace(tmp_path / "trace").events(Foreign)
    assert (one.message_type, one.size, two.size) == ("query.x", 2, 128 + X.nbytes)  # type: ignore[attr-defined]


def test_names_that_would_fill_the_index_are_kept_by_their_size(tmp_path: Path) -> None:
    content = RecordDict({"a" * (LONGEST_LINE // 8): pack({"w": X})})
    with Recorder(tmp_path / "trace") as recorder:
        recorder(Foreign(node=0, round=0, message_type="query.x", up=True, content=content))
    (found,) = Trace(tmp_path / "trace").events(Foreign)
    assert found.size == 128 + X.nbytes  # type: ignore[attr-defined]


def test_a_holding_that_cannot_be_read_again_is_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="__metadata__"), Recorder(tmp_path / "t") as recorder:
        recorder.hold("server", "top", {"__metadata__": X})


def rechained(lines: list[bytes]) -> bytes:
    """Make the checksums of damaged lines fit, where they are JSON still."""
    index = b""
    for line in lines:
        try:
            table = json.loads(line)
            table["before"] = hashlib.sha256(index).hexdigest()
            index += json.dumps(table).encode() + b"\n"
        except (ValueError, TypeError, RecursionError):
            index += line
    return index


def changed_value(line: bytes, draw: Random) -> bytes:
    """Give one place of a line another value, name or none, and leave it JSON."""
    table = json.loads(line)
    inner = table
    while True:
        name = draw.choice([*inner])
        if not isinstance(inner[name], dict) or not inner[name] or draw.random() < 0.3:
            break
        inner = inner[name]
    value = inner.pop(name)
    values = (None, True, -1, 1.5, "", "x", "../x", [], {}, [value], {"a": value}, 10**30, name)
    match draw.randrange(3):
        case 0:
            inner[name] = draw.choice(values)
        case 1:
            inner[str(draw.choice(VALUES))] = value
    return json.dumps(table).encode() + b"\n"


def damage(folder: Path, draw: Random, changes: Callable[[bytes, Random], bytes]) -> None:
    """Change the index or, with checksums that fit, a file that it names."""
    index = folder / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    place = draw.randrange(len(lines))
    if draw.random() < 0.5:
        lines[place] = changes(lines[place], draw)
        index.write_bytes(rechained(lines) if draw.random() < 0.9 else b"".join(lines))
        return
    segment = folder / SEGMENT
    data, (digest, number, offset, size) = segment.read_bytes(), draw.choice(places(lines))
    changed = mutated(data[offset : offset + size], draw)
    new = [hashlib.sha256(changed).hexdigest(), number, len(data), len(changed)]
    segment.write_bytes(data + changed)
    old = json.dumps([digest, number, offset, size], separators=(",", ":")).encode()
    index.write_bytes(rechained([line.replace(old, json.dumps(new).encode()) for line in lines]))


def places(lines: list[bytes]) -> list[list[Any]]:
    """Return all extents that an index names."""
    return [place for line in lines for place in json.loads(line).get("arrays", {}).values()]


FIRST, ALL, AT_A_TIME = 200, 5000, 1200


@pytest.mark.parametrize(
    "numbers",
    [
        range(FIRST),
        *(
            pytest.param(range(start, min(start + AT_A_TIME, ALL)), marks=pytest.mark.reproduces)
            for start in range(FIRST, ALL, AT_A_TIME)
        ),
    ],
    ids=str,
)
def test_damaged_traces_are_read_or_refused(tmp_path: Path, numbers: range) -> None:
    whole = tmp_path / "whole"
    with Recorder(whole, about={"cut": 1, "names": ["a"]}) as recorder:
        recorder(SmashedUp(node=0, round=1, smashed=X, labels=np.array([1, 2])))
        recorder(UpdateUp(node=1, round=1, before={"w": X}, after={"w": -X}, train_loss=0.5))
        recorder.hold("server", "top/round-1", {"w": X})
        content = RecordDict({"a": pack({"w": X})})
        recorder(Foreign(node=0, round=0, message_type="query.x", up=True, content=content))
    outcomes = []
    for number in numbers:
        draw, folder = Random(number), tmp_path / "damaged"
        shutil.copytree(whole, folder)
        damage(folder, draw, draw.choice((mutated, changed_value)))
        try:
            read(folder)
            outcomes.append(False)
        except TraceError as error:
            assert str(error).strip()  # noqa: PT017
            outcomes.append(True)
        except Exception as error:
            raise AssertionError(f"number {number}") from error
        finally:
            shutil.rmtree(folder)
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.98
