"""Lines with both of their ends in this process."""

import gc
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from threading import Event, Lock, Thread, current_thread
from typing import Any

import numpy as np
import pytest

from leakbed.grids.ray.calls import CallFailedError, Worker, WorkerGoneError
from leakbed.grids.ray.lines import Broadcast, Lines, listen
from leakbed.grids.ray.parcels import Parcel, opened
from leakbed.grids.ray.shelf import make_shelf, remove_shelf
from tests.support.waiting import until

KEY = b"between these two"
LARGE = 80_000  # bytes, several of which fill a socket


@pytest.fixture
def folder() -> Iterator[str]:
    made = make_shelf()
    assert made is not None
    yield made
    remove_shelf(made)


class Host:
    """A worker's handler, and who called it."""

    def __init__(self) -> None:
        self.threads, self.go_on = set[str](), Event()

    def __call__(self, parcel: Parcel, shared: Parcel | None) -> Parcel:
        self.threads.add(current_thread().name)
        if parcel == b"raise":
            raise ZeroDivisionError("no reason")
        if parcel == b"end":
            raise SystemExit
        if parcel == b"wait":
            self.go_on.wait(20)
        return parcel if shared is None else (parcel, *map(bytes, opened(shared)[1]))


class Pair:
    """One worker on a line."""

    def __init__(self, folder: str) -> None:
        self.host, self.worker = Host(), Worker(0, None)
        self.lines = Lines(folder, KEY)
        self.address = listen(self.host, folder=folder, key=KEY)

    def call(self, parcel: Parcel, shared: Any = None) -> Any:
        return self.lines.start(self.worker, parcel, shared)

    def wait(self, ticket: Any) -> Parcel:
        """Return an answer as the grid's loop does."""
        deadline = time.monotonic() + 20
        while ticket not in self.lines.there([ticket], deadline - time.monotonic()):
            assert time.monotonic() < deadline, "it hangs"
        return self.lines.answer(ticket)


@pytest.fixture
def pair(folder: str) -> Iterator[Pair]:
    made = Pair(folder)
    made.lines.connect(made.worker, made.address)
    yield made
    made.host.go_on.set()
    made.lines.disconnect(made.worker)


def test_calls_are_answered_in_their_order_in_one_thread(pair: Pair, folder: str) -> None:
    tickets = [pair.call(bytes([i])) for i in range(50)]
    assert [pair.wait(ticket) for ticket in tickets] == [bytes([i]) for i in range(50)]
    assert pair.host.threads == {"line"}
    assert list(Path(folder).iterdir()) == []  # nor a socket that others could call


def test_two_hundred_large_messages_pushed_before_any_pull_block_nobody(pair: Pair) -> None:
    sent = [bytes([i]) * LARGE for i in range(200)]
    tickets: list[Any] = []
    pusher = Thread(target=lambda: tickets.extend(map(pair.call, sent)), daemon=True)
    pusher.start()
    pusher.join(20)
    assert not pusher.is_alive(), "it hangs"
    assert [pair.wait(ticket) for ticket in tickets] == sent


def test_a_handler_that_hangs_keeps_nobody_from_sending(pair: Pair) -> None:
    tickets = [pair.call(b"wait"), *(pair.call(bytes(LARGE)) for _ in range(50))]
    assert pair.lines.there(tickets, 0.05) == []
    pair.host.go_on.set()
    assert [len(pair.wait(ticket)) for ticket in tickets] == [4] + [LARGE] * 50


def test_what_is_called_before_the_worker_has_started_goes_out_then(folder: str) -> None:
    pair = Pair(folder)
    ticket = pair.call(b"early")
    assert pair.lines.there([ticket], 0.01) == []
    pair.lines.connect(pair.worker, pair.address)
    assert pair.wait(ticket) == b"early"
    pair.lines.disconnect(pair.worker)


def test_a_worker_that_cannot_understand_says_so_and_goes_on(pair: Pair) -> None:
    failed, fine = pair.call(b"raise"), pair.call(b"fine")
    with pytest.raises(CallFailedError, match="ZeroDivisionError: no reason"):
        pair.wait(failed)
    assert pair.wait(fine) == b"fine"


def test_a_worker_that_ends_leaves_the_answers_that_were_there(pair: Pair) -> None:
    first, last, never = [pair.call(parcel) for parcel in (b"first", b"end", b"never")]
    assert pair.wait(first) == b"first"
    for ticket in (last, never, pair.call(b"later")):
        with pytest.raises(WorkerGoneError, match="its line is broken"):
            pair.wait(ticket)


def test_a_worker_that_is_gone_before_it_is_called_is_gone(folder: str) -> None:
    lines, worker = Lines(folder, KEY), Worker(0, None)
    lines.connect(worker, f"{folder}/nobody")
    ticket = lines.start(worker, b"?", None)
    assert lines.there([ticket], 10) == [ticket]
    with pytest.raises(WorkerGoneError):
        lines.answer(ticket)


def test_nobody_gets_on_a_line_without_its_key(folder: str) -> None:
    pair = Pair(folder)
    with pytest.raises(AuthenticationError):
        Client(pair.address, authkey=b"another")
    pair.lines.connect(pair.worker, pair.address)
    assert pair.wait(pair.call(b"x")) == b"x"
    pair.lines.disconnect(pair.worker)


def test_a_broadcast_lies_on_the_shelf_while_a_call_may_need_it(pair: Pair, folder: str) -> None:
    values = np.arange(100_000.0)
    shared = pair.lines.share([], [values.tobytes()])
    assert isinstance(shared, Broadcast)
    for _ in range(2):
        said, buffer = pair.wait(pair.call(b"x", shared))
        assert said == b"x"
        assert np.array_equal(np.frombuffer(buffer), values)
    assert len(list(Path(folder).iterdir())) == 1
    del shared
    gc.collect()
    assert list(Path(folder).iterdir()) == []


def test_threads_wait_each_for_its_own(pair: Pair) -> None:
    answers, lock = dict[int, list[bytes]](), Lock()

    def many(number: int) -> None:
        answers[number] = []
        for i in range(100):
            with lock:  # as the pool has one
                ticket = pair.call(bytes([number, i]))
            answers[number].append(pair.wait(ticket))

    threads = [Thread(target=many, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {n: [bytes([n, i]) for i in range(100)] for n in range(2)}


def test_a_thread_that_waits_for_ever_hears_of_a_worker_that_starts_later(folder: str) -> None:
    """It is the one that reads; the other's answer must come through it."""
    pair, late = Pair(folder), Worker(1, None)
    pair.lines.connect(pair.worker, pair.address)
    waiting = Thread(target=lambda: pair.wait(pair.call(b"wait")), daemon=True)
    waiting.start()
    until(lambda: pair.lines._reading)
    host = Host()
    pair.lines.connect(late, listen(host, folder=folder, key=KEY))
    ticket = pair.lines.start(late, b"soon", None)
    assert pair.lines.there([ticket], 10) == [ticket]
    pair.host.go_on.set()
    waiting.join(20)
    for worker in (pair.worker, late):
        pair.lines.disconnect(worker)
