"""A trace that may lack something of what was seen is opened only by who asks for part of one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from leakbed.events import SmashedUp, WeightsDown
from leakbed.tap.segments import TraceError
from leakbed.tap.trace import Recorder, Trace

X = np.arange(6, dtype=np.float32).reshape(2, 3)
EVENT, OTHER = (SmashedUp(node=0, round=1, smashed=X + more) for more in range(2))


def test_a_trace_whose_recording_was_stopped_is_refused(tmp_path: Path) -> None:
    def stopped() -> None:
        with Recorder(tmp_path / "trace") as recorder:
            recorder(EVENT)
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(TraceError, match="was aborted after 1 records: KeyboardInterrupt: enough"):
        Trace(tmp_path / "trace")


def no_memory(*_: object) -> None:
    raise MemoryError("no room")


def test_a_trace_that_lacks_an_event_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the tap goes on, as it does unless it is strict."""
    recorder = Recorder(tmp_path / "trace")
    recorder(EVENT)
    with monkeypatch.context() as patch:
        patch.setattr("leakbed.tap.trace.serialised", no_memory)
        with pytest.raises(MemoryError, match="no room"):
            recorder(WeightsDown(node=0, round=1, arrays={"w": X}))
    with pytest.raises(TraceError, match="is closed"):
        recorder(EVENT)
    recorder.close()
    with pytest.raises(TraceError, match="was aborted after 1 records: "):
        Trace(tmp_path / "trace")


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "write",
    [lambda recorder: recorder(OTHER), lambda recorder: recorder.hold("a", "b", {"w": X})],
    ids=["event", "holding"],
)
def test_a_trace_that_could_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Recorder], None]
) -> None:
    recorder = Recorder(tmp_path / "trace")
    recorder(EVENT)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space") as caught:
            write(recorder)
    assert caught.value.filename == str(tmp_path / "trace")
    recorder.close()
    with pytest.raises(TraceError, match="was aborted after 1 records: OSError"):
        Trace(tmp_path / "trace")


def test_an_index_that_could_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path / "trace")
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_write", full)
        with pytest.raises(OSError, match="No space"):
            recorder(EVENT)
    recorder.close()
    with pytest.raises(TraceError, match="is truncated: record 0 should follow"):
        Trace(tmp_path / "trace")


def test_part_of_a_trace_is_read_by_who_asks_for_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace", about={"a": 1})
    recorder(EVENT)
    recorder(OTHER)
    index = tmp_path / "trace/index.jsonl"
    whole = index.read_bytes()
    partial = Trace(tmp_path / "trace", partial=True)
    assert (len(partial.records), partial.about) == (2, {"a": 1})
    assert partial.incomplete == f"{tmp_path / 'trace'} is truncated: record 2 should follow"
    recorder.close()
    closed = index.read_bytes()
    assert Trace(tmp_path / "trace", partial=True).incomplete is None
    ends = [len(b"".join(whole.splitlines(keepends=True)[: n + 1])) for n in range(3)]
    for length in range(ends[0], len(closed)):
        index.write_bytes(closed[:length])
        read = Trace(tmp_path / "trace", partial=True)
        assert len(read.records) == sum(length >= end for end in ends[1:])
        assert read.incomplete is not None


def test_part_of_an_altered_trace_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace")
    for event in (EVENT, OTHER):
        recorder(event)
    index = tmp_path / "trace/index.jsonl"
    header, first, second = index.read_bytes().splitlines(keepends=True)
    for lines, said in (
        ([header, first[:30] + b"\n", second], "record 0 cannot be read"),
        ([header, first.replace(b'"node":0', b'"node":7'), second], "altered at record 0"),
        ([header, second], "record 0 is missing"),
        ([header[:20]], "is format None version None"),
        ([], "is format None version None"),
    ):
        index.write_bytes(b"".join(lines))
        with pytest.raises(TraceError, match=said):
            Trace(tmp_path / "trace", partial=True)
    recorder.close()


def test_a_recording_that_was_stopped_is_read_up_to_there(tmp_path: Path) -> None:
    def stopped() -> None:
        with Recorder(tmp_path / "trace") as recorder:
            recorder(EVENT)
            raise SystemExit(0)  # as Flower ends an app whose run is stopped

    with pytest.raises(SystemExit):
        stopped()
    read = Trace(tmp_path / "trace", partial=True)
    assert len(list(read.events())) == 1
    assert read.incomplete is not None
    assert read.incomplete.endswith("was aborted after 1 records: SystemExit: 0")


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from leakbed.events import WeightsDown
from leakbed.tap.trace import Recorder, Trace

folder, tries = Path(sys.argv[1]), int(sys.argv[2])
for number in range(tries):
    trace, (end, start) = folder / str(number), os.pipe()
    if not (child := os.fork()):
        recorder = Recorder(trace)
        os.write(start, b"0")
        for step in range(10**6):
            arrays = {"w": np.full(1 << 16, step, np.float32)}
            recorder(WeightsDown(node=0, round=1, step=step, arrays=arrays))
            os.write(start, b"1")
    wanted = 1 + number % 23
    written = sum(len(os.read(end, 1)) for _ in range(wanted)) - 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(start)
    while said := os.read(end, 4096):
        written += len(said)
    found = Trace(trace, partial=True)
    steps = [event.step for event in found.events()]
    assert steps == list(range(len(steps))) and len(steps) >= written, (number, written, steps)
    assert len(steps) <= written + 1 and found.incomplete
print("read", tries)
"""


@pytest.mark.parametrize("tries", [10, pytest.param(100, marks=pytest.mark.reproduces)])
def test_a_killed_process_leaves_every_whole_record(tmp_path: Path, tries: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tries)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert ended.stdout == f"read {tries}\n", ended.stderr
