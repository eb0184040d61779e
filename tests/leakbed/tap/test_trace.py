import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from leakbed.events import (
    Bottom,
    CutGradientDown,
    Event,
    Failed,
    Foreign,
    Phase,
    Sealed,
    SmashedUp,
    UpdateUp,
    WeightsDown,
)
from leakbed.tap.segments import Extent, TraceError, checksum
from leakbed.tap.trace import Recorder, Trace
from leakbed.wire.records import as_arrays, pack, unpack

X = np.arange(6, dtype=np.float32).reshape(2, 3)
WEIGHTS = {"w": X.T, "count": np.array(3), "flags": np.array([True]), "none": np.zeros((0, 2))}
AT: dict[str, int] = {"node": 1, "round": 2, "step": 3}
EVENTS: list[Event] = [
    WeightsDown(**AT, arrays=WEIGHTS),
    WeightsDown(**AT, arrays={"arrays": X}, phase=Phase.EVALUATE),  # a weight of that name
    UpdateUp(**AT, before=WEIGHTS, after={"after": X}, examples=7),
    UpdateUp(**AT, before={}, after={}),
    SmashedUp(**AT, smashed=X, labels=np.array([4, 5])),
    SmashedUp(**AT, smashed=X.astype(np.float16), rows=np.array([4]), phase=Phase.EVALUATE),
    CutGradientDown(**AT, gradient=X),
    Bottom(**AT, arrays=WEIGHTS, up=True),
    Sealed(**AT, size=12, up=False),
    Failed(**AT, message_type="train", reason='out of "memory"\n\u2028'),
    Foreign(**AT, message_type="query.x", up=True, content=RecordDict({"a": pack({"w": X})})),
]


def record(folder: Path, *events: Event, about: dict[str, Any] | None = None) -> Path:
    with Recorder(folder, about=about) as recorder:
        for event in events:
            recorder(event)
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Five records, each with a blob of its own; record 3 is what the server holds."""
    with Recorder(tmp_path / "trace", about={"protocol": "split"}) as recorder:
        for step in range(3):
            recorder(SmashedUp(node=0, round=1, step=step, smashed=X + step))
        recorder.hold("server", "top/round-1", WEIGHTS)
        recorder(CutGradientDown(node=0, round=1, gradient=-X))
    return tmp_path / "trace"


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_survives(tmp_path: Path, event: Event) -> None:
    (found,) = Trace(record(tmp_path / "trace", event)).events()
    assert type(found) is type(event)
    for field in fields(event):
        one, two = getattr(found, field.name), getattr(event, field.name)
        if isinstance(event, Foreign) and field.name == "content":
            one, two = unpack(one["a"]), unpack(two["a"])
        np.testing.assert_equal(one, two, err_msg=field.name)
        if isinstance(two, dict):
            assert {k: (v.dtype, v.shape) for k, v in one.items()} == {
                k: (v.dtype, v.shape) for k, v in two.items()
            }


def test_order_and_choice_of_events(tmp_path: Path) -> None:
    opened = Trace(record(tmp_path / "trace", *EVENTS, about={"cut": 2, "names": ["a"]}))
    assert [type(event) for event in opened.events()] == [type(event) for event in EVENTS]
    assert [record.number for record in opened.records] == list(range(len(EVENTS)))
    chosen = [type(event) for event in opened.events(SmashedUp, Sealed)]
    assert chosen == [SmashedUp, SmashedUp, Sealed]
    assert opened.about == {"cut": 2, "names": ["a"]}


def test_an_event_read_twice_is_two_events(trace: Path) -> None:
    opened = Trace(trace)
    first = next(opened.events())
    first.smashed[:] = 0  # type: ignore[attr-defined]
    assert np.array_equal(next(opened.events()).smashed, X)  # type: ignore[attr-defined]


def test_equal_arrays_are_stored_once(tmp_path: Path) -> None:
    broadcast = [WeightsDown(node=node, round=1, arrays={"w": X}) for node in range(5)]
    folder = record(tmp_path / "trace", *broadcast)
    assert len({record.arrays["arrays"] for record in Trace(folder).records}) == 1
    assert len(list(Trace(folder).events())) == 5


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    folder.mkdir(mode=0o755)
    with Recorder(folder) as recorder:
        recorder(EVENTS[0])
        recorder.hold("server", "top/deep/round-1", WEIGHTS)
        recorder.hold("server", "top/deep/round-2", WEIGHTS)
    for path in [folder, *folder.rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_holding_is_read_back_by_its_seat_alone(trace: Path) -> None:
    held = Trace(trace).holding("server", "top/round-1")
    assert held is not None
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(held[name], array, strict=True)
    assert Trace(trace).holding("client", "top/round-1") is None
    assert Trace(trace).holding("server", "top/round-2") is None


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match="is not empty; record into a new folder"):
        Recorder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_copy_elsewhere_opens_and_the_original_is_not_needed(trace: Path) -> None:
    copied = shutil.copytree(trace, trace.parent / "elsewhere")
    shutil.rmtree(trace)
    opened = Trace(copied)
    assert len(list(opened.events())) == 4
    assert opened.holding("server", "top/round-1") is not None


def test_a_second_close_is_harmless_and_an_end_without_one_still_closes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "one")
    recorder.close()
    recorder.close()
    assert list(Trace(tmp_path / "one").events()) == []
    program = "import sys; from leakbed.tap.trace import Recorder; Recorder(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "two")], check=True)  # noqa: S603
    assert Trace(tmp_path / "two").records == []


def test_an_open_trace_is_refused_as_truncated(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace")
    recorder(EVENTS[0])
    with pytest.raises(TraceError, match="is truncated: record 1 should follow"):
        Trace(tmp_path / "trace")
    recorder.close()
    assert len(Trace(tmp_path / "trace").records) == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"holds no trace: there is no index\.jsonl"):
        Trace(tmp_path)


Lines = list[bytes]


def flipped(line: bytes, old: bytes, new: bytes) -> bytes:
    assert old in line
    return line.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # Lines: header, records 0 to 4, end.
        (lambda ls: [*ls[:-1], ls[-1][:-5]], "truncated: record 5 cannot be read"),
        (lambda ls: [*ls[:-1], ls[-1][:-1]], "truncated: record 5 cannot be read"),
        (lambda ls: ls[:-1], "truncated: record 5 should follow"),
        (lambda ls: [*ls[:-2], ls[-2][:30]], "truncated: record 4 cannot be read"),
        (lambda ls: [*ls[:-2], ls[-1]], "truncated: record 4 is missing"),
        (lambda ls: ls[:2] + ls[3:], "truncated: record 1 is missing"),
        (lambda ls: ls[:2] + ls[2:3] * 2 + ls[3:], "truncated: record 2 is missing"),
        (lambda ls: [*ls[:2], ls[3], ls[2], *ls[4:]], "truncated: record 1 is missing"),
        (lambda ls: [*ls, ls[-1]], "truncated: record 6 is missing"),
        (
            lambda ls: [*ls[:3], flipped(ls[3], b'"step":2', b'"step":1'), *ls[4:]],
            "altered at record 2",
        ),
        (
            lambda ls: [*ls[:5], flipped(ls[5], b'"node":0', b'"node":1'), *ls[6:]],
            "altered at record 4",
        ),
        (lambda ls: [flipped(ls[0], b"split", b"spilt"), *ls[1:]], "altered at record 0"),
        (lambda ls: [*ls[:2], b"\xff" + ls[2][1:], *ls[3:]], "record 1 cannot be read"),
        (lambda ls: [flipped(ls[0], b'"version":2', b'"version":1')], "version 1; this version"),
        (lambda ls: [], "is format None version None; this version of Leakbed reads"),
    ],
)
def test_a_damaged_index_is_refused_with_the_records_number(
    trace: Path, damage: Callable[[Lines], Lines], message: str
) -> None:
    index = trace / "index.jsonl"
    index.write_bytes(b"".join(damage(index.read_bytes().splitlines(keepends=True))))
    with pytest.raises(TraceError, match=message):
        Trace(trace)


def segment_of(trace: Path, number: int) -> tuple[Path, Extent]:
    (extent,) = Trace(trace).records[number].arrays.values()
    return trace / extent.inside, extent


@pytest.mark.parametrize("number", [0, 2, 3, 4])
def test_damaged_arrays_are_refused_with_the_records_number(trace: Path, number: int) -> None:
    segment, extent = segment_of(trace, number)
    data = bytearray(segment.read_bytes())
    data[extent.offset + extent.size - 1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(TraceError, match=rf"record {number} \(.* was altered: .*checksum"):
        Trace(trace)
    data[extent.offset + extent.size - 1] ^= 1
    segment.write_bytes(data[: extent.offset + extent.size - 4])
    with pytest.raises(TraceError, match=rf"record {number} \(.* was altered: .* before its last"):
        Trace(trace)
    segment.unlink()
    with pytest.raises(TraceError, match=r"record 0 \(.* is missing its file"):
        Trace(trace)


def test_arrays_altered_after_opening_are_refused_too(trace: Path) -> None:
    opened = Trace(trace)
    segment, extent = segment_of(trace, 1)
    data = bytearray(segment.read_bytes())
    data[extent.offset + extent.size - 1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(TraceError, match="record 1 "):
        list(opened.events())


def test_nothing_is_pickled(trace: Path) -> None:
    source = Path(sys.modules["leakbed.tap.trace"].__file__ or "").read_text()
    assert "import pickle" not in source
    assert {path.suffix for path in trace.rglob("*") if path.is_file()} == {".jsonl", ".bin"}
    objects = {"w": np.array([{}], dtype=object)}
    with Recorder(trace.parent / "new") as recorder:
        recorder(WeightsDown(node=0, round=1, arrays=objects))
    assert not list((trace.parent / "new/segments").iterdir())
    (kept,) = Trace(trace.parent / "new").events()
    assert isinstance(kept, Foreign)


def test_arrays_keep_the_order_they_came_in(tmp_path: Path) -> None:
    arrays = {name: np.zeros(2, kind) for name, kind in zip("qbxa", "fdhf", strict=True)}
    folder = record(tmp_path / "trace", UpdateUp(**AT, before=arrays, after=arrays))
    for _ in range(5):
        (found,) = Trace(folder).events(UpdateUp)
        assert list(found.before) == list("qbxa")  # type: ignore[attr-defined]


def test_a_write_that_fails_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, write = Recorder(tmp_path / "trace"), os.write
    recorder(EVENTS[4])
    segment = tmp_path / "trace/segments/000000.bin"
    before = segment.read_bytes()

    def full(file: int, data: memoryview) -> int:
        """Write to a disk that takes a hundred bytes more."""
        if segment.stat().st_size >= len(before) + 100:
            raise OSError(28, "No space left on device")
        return write(file, data[:100])

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space"):
            recorder(WeightsDown(**AT, arrays={"w": np.ones(100)}))
    recorder.close()
    assert segment.read_bytes() == before
    assert len(list(Trace(tmp_path / "trace", partial=True).events())) == 1


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("os.write", lambda file, data: write(file, data[:7]))
    folder = record(tmp_path / "trace", *EVENTS)
    assert len(list(Trace(folder).events())) == len(EVENTS)


def test_a_full_segment_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbed.tap.segments.FULL", 300)
    folder = record(tmp_path / "trace", *EVENTS)
    sizes = {path.name: path.stat().st_size for path in (folder / "segments").iterdir()}
    assert len(sizes) > 2
    assert all(size >= 300 for name, size in sizes.items() if name != max(sizes))
    assert [type(event) for event in Trace(folder).events()] == [type(event) for event in EVENTS]


def test_equal_arrays_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that all nodes get is one object in memory; equal replies have bytes of their own."""
    hashed: list[int] = []
    sizes: list[int] = []

    def counted(parts: list[bytes]) -> str:
        hashed.append(len(parts))
        sizes.append(sum(map(len, parts)))
        return checksum(parts)

    monkeypatch.setattr("leakbed.tap.segments.checksum", counted)
    large = np.arange(1 << 15, dtype=np.float32)
    sent = pack({"w": large, "b": X})
    model = as_arrays(sent)
    with Recorder(tmp_path / "trace") as recorder:
        for node in range(4):
            recorder(WeightsDown(node=node, round=1, arrays=as_arrays(sent)))
        for node in range(4):
            equal = as_arrays(pack({"w": large + 1}))
            recorder(UpdateUp(node=node, round=1, before=model, after=equal))
        assert len(hashed) == 2
        recorder(UpdateUp(node=4, round=1, before=model, after=as_arrays(pack({"w": large + 2}))))
        renamed = {"v": model["w"], "b": model["b"]}
        recorder(WeightsDown(node=5, round=1, arrays=renamed))
        recorder(WeightsDown(node=6, round=1, arrays={**model, "b": model["b"].T}))
        assert len(hashed) == 5
        mine = large.copy()
        for _ in range(2):  # memory that may change is hashed anew
            recorder(WeightsDown(node=7, round=1, arrays={"w": mine}))
            mine += 1
        assert len(hashed) == 7
        whole, hashed[:] = np.arange(1 << 18, dtype=np.float32), []
        for number in range(3):  # where none begins so, it is hashed as it is written
            recorder(WeightsDown(node=8, round=1, arrays={"w": whole + number}))
        assert hashed == [2, 2, 2]  # a look at each one's beginning
        assert max(sizes[-3:]) < 10_000
        recorder(WeightsDown(node=9, round=1, arrays={"w": whole.copy()}))
        assert hashed == [2, 2, 2, 2, 2]
        last = whole.copy()
        last[-1] = 0
        recorder(WeightsDown(node=9, round=1, arrays={"w": last}))
        assert len(hashed) == 7
    events: list[Any] = list(Trace(tmp_path / "trace").events())
    assert all(np.array_equal(each.after["w"], large + 1) for each in events[4:8])
    assert np.array_equal(events[8].after["w"], large + 2)
    assert list(events[9].arrays) == ["v", "b"]
    assert np.array_equal(events[10].arrays["b"], X.T)
    assert [float(each.arrays["w"][0]) for each in events[11:13]] == [0.0, 1.0]
    assert [float(each.arrays["w"][0]) for each in events[13:17]] == [0.0, 1.0, 2.0, 0.0]
    assert np.array_equal(events[17].arrays["w"], last)
    extents = [r.arrays["arrays"] for r in Trace(tmp_path / "trace").records[13:]]
    assert extents[3] == extents[0]
    assert len(set(extents)) == 4


def test_a_trace_that_was_held_outlives_its_folder(trace: Path) -> None:
    held, told = Trace(trace), Trace(trace)
    events, weights = list(told.events()), told.holding("server", "top/round-1")
    size = sum(file.stat().st_size for file in (trace / "segments").iterdir())
    told.hold(at_most=size - 1)  # too long, so it stays where it is
    held.hold(at_most=size)
    shutil.rmtree(trace)
    for event, known in zip(held.events(), events, strict=True):
        assert type(event) is type(known)
        for name in (each.name for each in fields(event)):
            np.testing.assert_equal(getattr(event, name), getattr(known, name))
    assert weights is not None
    np.testing.assert_equal(held.holding("server", "top/round-1"), weights)
    first = next(held.events(SmashedUp))
    assert isinstance(first, SmashedUp)
    first.smashed[:] = 9  # arrays of its own
    np.testing.assert_equal(next(held.events(SmashedUp)).smashed, events[0].smashed)  # type: ignore[attr-defined]
    with pytest.raises(TraceError):
        list(told.events())
