"""A trace that does not hold all that was seen is never opened."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from leakbed.events import SmashedUp, WeightsDown
from leakbed.trace import Recorder, Trace, TraceError

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
        patch.setattr("leakbed.trace.serialised", no_memory)
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
        patch.setattr("leakbed.trace._write_private", full)
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
