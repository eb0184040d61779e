import threading
from collections.abc import Iterator

import pytest

from leakbed.grids.deadlines import CallThread, overran
from tests.waiting import until


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()
    until(lambda: overran() is None)


def test_it_returns_what_the_call_returns() -> None:
    assert CallThread[int]().run(lambda: 3, seconds=10, what="a") == 3
    assert overran() is None


def test_it_raises_what_the_call_raises_and_still_serves() -> None:
    thread = CallThread[float]()
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0, seconds=10, what="a")
    with pytest.raises(SystemExit):
        thread.run(exit, seconds=10, what="a")
    assert thread.run(lambda: 0.5, seconds=10, what="a") == 0.5
    assert overran() is None


def test_a_call_that_overruns_is_named_until_it_returns(release: threading.Event) -> None:
    thread = CallThread[bool]()
    with pytest.raises(TimeoutError):
        thread.run(release.wait, seconds=0.05, what="the slow one")
    assert overran() == "the slow one"
    release.set()
    until(lambda: overran() is None)
    assert thread.run(lambda: True, seconds=10, what="b")


def test_without_time_a_call_is_not_started() -> None:
    calls: list[int] = []
    with pytest.raises(TimeoutError, match="no time left for a"):
        CallThread[None]().run(lambda: calls.append(1), seconds=0, what="a")
    assert not calls
    assert overran() is None


def test_the_thread_ends_with_its_owner() -> None:
    thread = CallThread[int]()
    thread.run(lambda: 3, seconds=10, what="a")
    serving = thread._thread
    assert serving is not None
    del thread
    serving.join(10)
    assert not serving.is_alive()
