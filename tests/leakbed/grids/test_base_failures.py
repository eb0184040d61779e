"""A client that raises, dies or never answers stops the run and is named; nothing hangs."""

import pickle
import time
from collections.abc import Callable, Iterator

import pytest
from flwr.serverapp import Grid

from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.grids.local import overran
from leakbed.tap.wiretap import Wiretap
from tests.support import strange_nodes
from tests.support.strange_nodes import message
from tests.support.waiting import timer_free, timer_in_use, until

pytestmark = pytest.mark.usefixtures("identity")

MakeGrid = Callable[[], Grid]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.runtime)], scope="module")
def make_grid(request: pytest.FixtureRequest) -> Iterator[MakeGrid]:
    if request.param == "local":
        yield lambda: LocalGrid(strange_nodes.app, nodes=3)
        return
    from leakbed.grids.ray.actors import start_ray, stop_ray  # noqa: PLC0415
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  only where Ray is wanted

    start_ray(None, cpus=2)
    with RayGrid(strange_nodes.app, nodes=3, workers=2) as grid:
        yield lambda: grid
    stop_ray()


@pytest.fixture
def released() -> Iterator[None]:
    """Let nodes that hang in this process go at the end."""
    strange_nodes.release.clear()
    yield
    strange_nodes.release.set()
    until(lambda: overran() is None)


def canonical(grid: Grid) -> Wiretap:
    ours = DeterministicGrid(grid, stream=1, timeout=60)
    return Wiretap(ours, roster=ours.roster)


def test_a_client_that_raises_stops_the_run_and_is_named(make_grid: MakeGrid) -> None:
    with pytest.raises(NodeFailed) as caught:
        canonical(make_grid()).send_and_receive(
            [message(1, "count"), message(3, "raise"), message(2, "count")], timeout=60
        )
    assert (caught.value.node, caught.value.message_type) == (2, "query.raise")
    assert caught.value.cause.startswith("ZeroDivisionError: no reason at all (strange_nodes.py, ")
    assert str(caught.value).startswith("node 2 failed on 'query.raise': ZeroDivisionError")


def test_the_first_failure_by_partition_is_named(make_grid: MakeGrid) -> None:
    with pytest.raises(NodeFailed, match="node 1 failed"):
        canonical(make_grid()).send_and_receive([message(3, "raise"), message(2, "raise")])


@pytest.mark.usefixtures("released")
def test_a_client_that_never_answers_stops_the_run_and_is_named(make_grid: MakeGrid) -> None:
    grid = canonical(make_grid())
    started = time.monotonic()
    with pytest.raises(NodeFailed) as caught:
        grid.send_and_receive([message(1, "count"), message(2, "hang")], timeout=1)
    assert time.monotonic() - started < 20
    failed = caught.value
    assert (failed.node, failed.message_type, failed.cause) == (
        1,
        "query.hang",
        "no reply within 1 s",
    )


@pytest.mark.usefixtures("released")
def test_a_node_that_overran_locally_keeps_others_out_until_it_returns() -> None:
    """Two would draw from the same global generators: also in a new grid of the same process."""
    grid = LocalGrid(strange_nodes.app, nodes=3)
    with timer_in_use():  # else the node is stopped
        hung = grid.send_and_receive([message(2, "hang"), message(1, "count")], timeout=0.1)
    assert list(hung) == []
    other = LocalGrid(strange_nodes.app, nodes=3)
    with pytest.raises(NodeFailed, match=r"node 1 on 'query.hang' overran and still runs"):
        canonical(other).send_and_receive([message(1, "count")])
    strange_nodes.release.set()
    until(lambda: overran() is None)
    (reply,) = other.send_and_receive([message(1, "count")])
    assert not reply.has_error()


@pytest.mark.usefixtures("released")
def test_a_node_that_overran_in_the_main_thread_is_stopped() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    with timer_free():
        hung = grid.send_and_receive([message(2, "hang"), message(1, "count")], timeout=0.1)
    assert list(hung) == []
    assert overran() is None
    (reply,) = grid.send_and_receive([message(1, "count")])
    assert not reply.has_error()


def test_a_failure_survives_the_way_between_processes() -> None:
    failure = NodeFailed(2, "train", "no disk")
    copy = pickle.loads(pickle.dumps(failure))  # noqa: S301  Ray does it
    assert (copy.node, copy.message_type, copy.cause) == (2, "train", "no disk")
    assert str(copy) == "node 2 failed on 'train': no disk"
