import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from leakbed.events import (
    Event,
    UpdateUp,
)
from leakbed.grids import LocalGrid
from leakbed.seeds import guarded
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.wiretap import GridWrapper, Wiretap
from tests.support.stranger import X, grid, out, train

pytestmark = pytest.mark.usefixtures("identity")


def run_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  shown to the test below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


class Slow(GridWrapper):
    """A grid that lets other threads run in the middle of each exchange."""

    def __init__(self, inner: LocalGrid) -> None:
        super().__init__(inner)
        self._one = threading.Lock()  # LocalGrid itself makes no promise about threads

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with self._one:
            return list(self._grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._one:
            return list(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def test_many_threads_lose_and_mix_up_nothing() -> None:
    inside, seen = threading.Lock(), []

    def hook(event: Event) -> None:
        assert inside.acquire(blocking=False), "two hooks ran at once"
        time.sleep(0.0005)  # lets other threads run, here of all places
        seen.append(event)
        inside.release()

    tap = Wiretap(Slow(grid(8)), [hook], strict=True)

    def work(index: int) -> None:
        for turn in range(20):
            value = 100.0 * index + turn
            message = train(index + 1, value=value)
            if turn % 2:
                (reply,) = tap.send_and_receive([message])
            else:
                (reply,) = tap.pull_messages(tap.push_messages([message]))
            assert np.array_equal(out(reply), X + value + 1)

    run_threads(work, 8)
    updates = [event for event in seen if isinstance(event, UpdateUp)]
    assert len(seen) == 2 * len(updates) == 320
    assert all(np.array_equal(e.after["w"], e.before["w"] + 1) for e in updates)
    assert all(e.before["w"][0, 0] // 100 == e.node - 1 for e in updates)
    size = train().content["arrays"].count_bytes()
    assert (tap.bytes_down, tap.bytes_up) == (160 * size, 160 * size)
    assert tap._pending == {}


class Drawing:
    """A thread of the app's own that draws from the global generator whenever it is woken."""

    def __init__(self) -> None:
        self.drawn: list[float] = []
        self._wake, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def draw(self) -> None:
        """Let the thread draw once, in the middle of whatever this thread is doing."""
        self._wake.set()
        assert self._done.wait(10)
        self._done.clear()

    def _run(self) -> None:
        while self._wake.wait(10):
            self._wake.clear()
            self.drawn.append(random.random())
            self._done.set()


def test_recording_leaves_what_other_threads_draw_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Drawing()
    write = Recorder._write

    def slow(recorder: Recorder, line: dict[str, object]) -> None:
        other.draw()
        write(recorder, line)

    monkeypatch.setattr(Recorder, "_write", slow)
    with guarded():
        random.seed(5)
        with Recorder(tmp_path / "trace") as recorder:
            tap = Wiretap(grid(), [recorder], strict=True)
            for _ in range(3):
                tap.send_and_receive([train()])
    untapped = random.Random(5)
    assert len(Trace(tmp_path / "trace").records) == 6
    assert other.drawn == [untapped.random() for _ in range(8)]  # header, records, closing line
