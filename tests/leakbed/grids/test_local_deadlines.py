"""A call ends in time: by the system's timer in the main thread, by a second thread elsewhere."""

import signal
import threading
from collections.abc import Iterator

import pytest

from leakbed.grids.local import CallThread, overran
from tests.support.waiting import timer_free, timer_in_use, until


@pytest.fixture
def by_thread() -> Iterator[None]:
    with timer_in_use():
        yield


@pytest.fixture(params=["timer", "thread"])
def either(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("by_thread" if request.param == "thread" else "alarm")


@pytest.fixture
def alarm() -> Iterator[None]:
    """Give the timer to the call, which must leave it and its signal as they were found."""
    with timer_free():
        yield
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures("alarm")
def test_in_the_main_thread_a_call_needs_no_other() -> None:
    thread = CallThread[threading.Thread]()
    assert thread.run(threading.current_thread, seconds=10, what="a") is threading.main_thread()
    assert thread._thread is None


@pytest.mark.usefixtures("alarm")
def test_in_the_main_thread_a_call_that_overruns_is_stopped() -> None:
    ended: list[str] = []

    def waits() -> None:
        try:
            threading.Event().wait()
        finally:
            ended.append("cleaned up")

    with pytest.raises(TimeoutError, match="no time left for the slow one"):
        CallThread[None]().run(waits, seconds=0.05, what="the slow one")
    assert ended == ["cleaned up"]
    assert overran() is None


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("swallowed", [True, False])
def test_what_a_call_makes_of_its_interruption_is_no_answer(swallowed: bool) -> None:
    def waits() -> int:
        try:
            threading.Event().wait()
        except BaseException as error:
            if not swallowed:
                raise ValueError("other words") from error
        return 3

    with pytest.raises(TimeoutError, match="no time left for a"):
        CallThread[int]().run(waits, seconds=0.05, what="a")


@pytest.mark.usefixtures("alarm")
def test_a_call_is_interrupted_again_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakbed.grids.local._AGAIN", 0.05)
    interrupted: list[int] = []

    def waits() -> None:
        while len(interrupted) < 3:
            try:
                threading.Event().wait()
            except BaseException:  # noqa: BLE001  as a careless app may
                interrupted.append(1)

    with pytest.raises(TimeoutError):
        CallThread[None]().run(waits, seconds=0.05, what="a")
    assert len(interrupted) == 3


@pytest.mark.usefixtures("alarm")
def test_an_inner_call_takes_a_thread() -> None:
    def inner() -> threading.Thread:
        return CallThread[threading.Thread]().run(threading.current_thread, seconds=10, what="b")

    found = CallThread[threading.Thread]().run(inner, seconds=10, what="a")
    assert found is not threading.main_thread()


def test_a_timer_of_the_programs_own_is_left_alone() -> None:
    with timer_free():
        signal.setitimer(signal.ITIMER_REAL, 60)
        found = CallThread[threading.Thread]().run(threading.current_thread, seconds=10, what="a")
        assert found is not threading.main_thread()
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()
    until(lambda: overran() is None)


@pytest.mark.usefixtures("either")
def test_it_returns_what_the_call_returns() -> None:
    assert CallThread[int]().run(lambda: 3, seconds=10, what="a") == 3
    assert overran() is None


@pytest.mark.usefixtures("either")
def test_it_raises_what_the_call_raises_and_still_serves() -> None:
    thread = CallThread[float]()
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0, seconds=10, what="a")
    with pytest.raises(SystemExit):
        thread.run(exit, seconds=10, what="a")
    assert thread.run(lambda: 0.5, seconds=10, what="a") == 0.5
    assert overran() is None


@pytest.mark.usefixtures("by_thread")
def test_a_call_that_overruns_is_named_until_it_returns(release: threading.Event) -> None:
    thread = CallThread[bool]()
    with pytest.raises(TimeoutError):
        thread.run(release.wait, seconds=0.05, what="the slow one")
    assert overran() == "the slow one"
    release.set()
    until(lambda: overran() is None)
    assert thread.run(lambda: True, seconds=10, what="b")


@pytest.mark.usefixtures("either")
def test_without_time_a_call_is_not_started() -> None:
    calls: list[int] = []
    with pytest.raises(TimeoutError, match="no time left for a"):
        CallThread[None]().run(lambda: calls.append(1), seconds=0, what="a")
    assert not calls
    assert overran() is None


@pytest.mark.usefixtures("by_thread")
def test_the_thread_ends_with_its_owner() -> None:
    thread = CallThread[int]()
    thread.run(lambda: 3, seconds=10, what="a")
    serving = thread._thread
    assert serving is not None
    del thread
    serving.join(10)
    assert not serving.is_alive()
