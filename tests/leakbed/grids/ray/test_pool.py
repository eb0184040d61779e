"""Who serves which node, and what becomes of the nodes of a worker that dies."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from leakbed.flower_internals import NODE_UNAVAILABLE
from leakbed.grids.ray.actors import start_ray, stop_ray
from leakbed.grids.ray.grid import RayGrid
from tests.support import strange_nodes
from tests.support.strange_nodes import message, said
from tests.support.waiting import running, until

pytestmark = [pytest.mark.runtime, pytest.mark.usefixtures("ray_here", "identity")]
Make = Callable[..., RayGrid]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    assert start_ray(None, cpus=4)
    yield
    stop_ray()


@pytest.fixture(scope="module")
def grid(ray_here: None) -> Iterator[RayGrid]:
    """A grid nobody breaks."""
    with RayGrid(strange_nodes.app, nodes=10_000, workers=2) as made:
        yield made


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a grid to break."""
    made: list[RayGrid] = []

    def make(*, nodes: int = 6, workers: int) -> RayGrid:
        made.append(RayGrid(strange_nodes.app, nodes=nodes, workers=workers))
        return made[0]

    yield make
    for grid in made:
        grid.close()


def answers(grid: RayGrid, kind: str, nodes: Iterable[int]) -> list[dict[str, Any]]:
    replies = list(grid.send_and_receive([message(node, kind) for node in nodes]))
    return [said(reply) for reply in replies]


def pulled(grid: RayGrid, ids: Iterable[str], *, within: float = 60) -> list[Message]:
    """All replies to pushed messages, as a strategy's own loop collects them."""
    wanted, found, deadline = list(ids), list[Message](), time.monotonic() + within
    while len(found) < len(wanted):
        assert time.monotonic() < deadline, "no reply: it hangs"
        found += grid.pull_messages(wanted)
    return found


def contexts(grid: RayGrid) -> list[list[int]]:
    """The nodes that are in each worker's memory."""
    assert grid._pool is not None
    inside = [
        worker.actor.__ray_call__.remote(lambda self: list(self._host._host._contexts))
        for worker in grid._pool.workers
    ]
    return list(ray.get(inside))


def lingering(grid: RayGrid, node: int, folder: Path) -> tuple[list[str], int]:
    """Push a message over which its worker can be killed; return the id and the process."""
    left = folder / "process"
    config = ConfigRecord({"file": str(left)})
    ids = list(grid.push_messages([message(node, "linger", RecordDict({"config": config}))]))
    until(left.exists)
    return ids, int(left.read_text())


def kill(process: int) -> None:
    """Kill a process and return once it is gone."""
    os.kill(process, signal.SIGKILL)
    until(lambda: not running(process))


def test_state_goes_home_and_only_active_nodes_stay_with_a_worker(grid: RayGrid) -> None:
    for calls in (1, 2, 3):
        assert {reply["calls"] for reply in answers(grid, "remember", range(1, 101))} == {calls}
    assert contexts(grid) == [[], []]
    answers(grid, "count", [7, 8])
    assert sorted(contexts(grid)) == [[7], [8]]
    answers(grid, "remember", [7, 8])
    assert contexts(grid) == [[], []]


def test_a_node_that_keeps_something_alive_stays_however_busy_its_worker_is(grid: RayGrid) -> None:
    (first,) = answers(grid, "count", [200])
    crowd = answers(grid, "count", [200, *range(201, 217), 200])
    assert {crowd[0]["process"], crowd[-1]["process"]} == {first["process"]}
    assert [crowd[0]["calls"], crowd[-1]["calls"]] == [2, 3]
    answers(grid, "remember", range(200, 217))


def test_messages_go_to_the_worker_with_the_fewest(grid: RayGrid) -> None:
    alone = [answers(grid, "remember", [node])[0]["process"] for node in (301, 303, 302, 304)]
    assert alone[0] == alone[1] != alone[2] == alone[3]  # by partition where both are idle
    together = [reply["process"] for reply in answers(grid, "remember", [301, 303, 305, 307])]
    assert [together.count(process) for process in set(together)] == [2, 2]


def test_ten_thousand_nodes_cost_what_the_sampled_ones_do(grid: RayGrid) -> None:
    assert grid._pool is not None
    known = len(grid._pool._nodes)
    answers(grid, "remember", range(9_000, 9_100))
    assert len(grid._pool._nodes) == known + 100  # the others are not there yet
    few = RayGrid(strange_nodes.app, nodes=100, workers=2)
    with few:
        shortest = {}
        for name, one, nodes in (("many", grid, range(9_000, 9_100)), ("few", few, range(1, 101))):
            times = []
            for _ in range(5):
                started = time.perf_counter()
                answers(one, "remember", nodes)
                times.append(time.perf_counter() - started)
            shortest[name] = min(times)
    assert shortest["many"] < 3 * shortest["few"] + 0.05  # 100 times the nodes


def test_two_messages_to_one_node_are_answered_in_their_order(grid: RayGrid) -> None:
    first = list(grid.push_messages([message(400, "remember")]))
    second = list(grid.push_messages([message(400, "remember")]))
    assert said(pulled(grid, second)[0])["calls"] == 2
    assert said(pulled(grid, first)[0])["calls"] == 1


def test_threads_may_share_a_grid(grid: RayGrid) -> None:
    counts: list[int] = []

    def many(node: int) -> None:
        counts.extend(answers(grid, "remember", [node])[0]["calls"] for _ in range(20))

    threads = [Thread(target=many, args=(node,)) for node in range(500, 504)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(counts) == sorted([*range(1, 21)] * 4)


def test_a_worker_killed_over_a_message_is_replaced_and_the_message_tried_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = make(workers=1)
    assert answers(grid, "remember", [1, 2])[0]["calls"] == 1
    ids, process = lingering(grid, 1, tmp_path)
    waiting = grid.push_messages([message(node, "remember") for node in (2, 3)])
    with caplog.at_level(logging.WARNING):
        os.kill(process, signal.SIGKILL)
        (reply,) = pulled(grid, ids)
    # From its last state, by another process, and so for those that waited behind it.
    assert (said(reply)["calls"], said(reply)["process"] != process) == (2, True)
    assert [said(other)["calls"] for other in pulled(grid, waiting)] == [2, 1]
    assert "worker 0 is gone (ActorDiedError)" in caplog.text
    assert answers(grid, "remember", [1, 2, 3])[0]["calls"] == 3


def test_others_take_over_at_once(make: Make, tmp_path: Path) -> None:
    grid = make(workers=2)
    other = answers(grid, "remember", [2])[0]["process"]
    ids, process = lingering(grid, 1, tmp_path)
    os.kill(process, signal.SIGKILL)
    assert said(pulled(grid, ids)[0])["process"] == other
    assert grid._pool is not None
    assert sorted(worker.number for worker in grid._pool.workers) == [1, 2]


def test_a_worker_killed_between_messages_takes_along_only_what_was_alive(make: Make) -> None:
    grid = make(workers=1)
    answers(grid, "remember", [1, 2])
    (alive,) = answers(grid, "count", [2])
    assert contexts(grid) == [[2]]
    kill(alive["process"])
    first, second = answers(grid, "remember", [1, 2])
    assert (first["calls"], second["calls"]) == (2, 2)  # as each was at its last reply home
    (again,) = answers(grid, "count", [2])
    assert (again["calls"], again["process"] != alive["process"]) == (1, True)


def test_a_message_over_which_two_workers_die_is_an_error_and_the_others_are_answered(
    make: Make,
) -> None:
    grid = make(workers=1)
    sent = [message(1, "die"), *(message(node, "remember") for node in (2, 3, 4))]
    died, *others = grid.send_and_receive(sent)  # without a timeout: nothing hangs
    assert died.error.code == NODE_UNAVAILABLE
    assert died.error.reason == "worker 1, which had this message, is gone, like the one before it"
    assert [said(other)["calls"] for other in others] == [1, 1, 1]
    assert answers(grid, "remember", [1])[0]["calls"] == 1


def test_a_message_that_kills_every_worker_leaves_the_answers_that_were_there(make: Make) -> None:
    grid = make(workers=2)
    died, alive = grid.send_and_receive([message(1, "die"), message(2, "remember")])
    assert died.error.code == NODE_UNAVAILABLE
    assert died.metadata.src_node_id == 1
    assert said(alive)["calls"] == 1
    assert [reply["calls"] for reply in answers(grid, "remember", [1, 2])] == [1, 2]


def test_what_nobody_waits_for_is_not_tried_again(make: Make, tmp_path: Path) -> None:
    grid = make(workers=1)
    answers(grid, "remember", [1])
    config = RecordDict({"config": ConfigRecord({"file": str(tmp_path / "process")})})
    assert list(grid.send_and_receive([message(1, "linger", config)], timeout=1)) == []
    os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)
    assert answers(grid, "remember", [1])[0]["calls"] == 2


def test_a_worker_that_cannot_be_replaced_ends_in_errors(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make(workers=1)
    answers(grid, "remember", [1])
    assert grid._pool is not None
    grid._pool._recipe.app = "tests.support.strange_nodes:gone"
    for _ in range(2):
        (reply,) = grid.send_and_receive([message(1, "die")])
        assert reply.error.code == NODE_UNAVAILABLE
    grid._pool._recipe.app = "tests.support.strange_nodes:app"
    assert answers(grid, "remember", [1])[0]["calls"] == 2  # its state was home


def test_a_replacement_that_never_starts_is_given_up(make: Make) -> None:
    grid = make(workers=2)
    assert grid._pool is not None
    grid._pool._recipe.num_gpus = 1.0  # of none
    answers(grid, "count", [1])
    (process,) = {reply["process"] for reply in answers(grid, "count", [1])}
    kill(process)
    assert answers(grid, "count", [1])[0]["calls"] == 1
    assert len(grid._pool.workers) == 2
    (starting,) = (worker for worker in grid._pool.workers if worker.ready is not None)
    starting.deadline = time.monotonic()  # as if its time were over
    answers(grid, "remember", [2])
    assert [worker.number for worker in grid._pool.workers] == [1]


def test_without_a_worker_and_without_room_for_one_there_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make(workers=1)
    assert grid._pool is not None
    monkeypatch.setattr("leakbed.grids.ray.actors.START_SECONDS", 1.0)
    grid._pool._recipe.num_gpus = 1.0  # of none
    sent = [message(1, "die"), message(2, "remember"), message(3, "remember")]
    replies = list(grid.send_and_receive(sent))  # without a timeout: nothing hangs
    assert [reply.error.code for reply in replies] == [NODE_UNAVAILABLE] * 3
    assert replies[1].error.reason == "worker 1, which had this message, is gone"


def test_a_broadcast_outlives_a_killed_worker(make: Make) -> None:
    grid = make(workers=2)
    process = answers(grid, "count", [1])[0]["process"]
    arrays = ArrayRecord({"x": Array(np.arange(100_000.0))})
    records = RecordDict({"arrays": arrays, "config": ConfigRecord({"value": 1})})
    ids = list(grid.push_messages([message(node, "change", records) for node in (1, 2, 3)]))
    os.kill(process, signal.SIGKILL)
    assert [said(reply)["size"] for reply in pulled(grid, ids)] == [1] * 3
