"""Requests go by themselves to nodes on Ray.

A stopped worker holds nobody up, a killed driver leaves nothing.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leakbed.events import CutGradientDown, SmashedUp
from leakbed.flower_internals import task_identity
from leakbed.grids import DeterministicGrid, NodeFailed
from leakbed.grids.ray.actors import start_ray, stop_ray
from leakbed.grids.ray.grid import RayGrid
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.bounds import Bounds
from leakbed.wire.calls import typed_call
from leakbed.wire.messages import HEAD_STEP, SPLIT_STEP, SplitReply, SplitRequest
from strategies.node_session import NodeChannel
from tests.support.strange_nodes import STOPPING, app
from tests.support.waiting import descendants, running, until

pytestmark = [pytest.mark.runtime, pytest.mark.usefixtures("identity")]
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def grid() -> Iterator[RayGrid]:
    assert start_ray(None, cpus=4)  # the grid of the stopped worker needs two beside this one's
    with task_identity(), RayGrid(app, nodes=3, workers=2) as made:
        yield made
    stop_ray()


def asked(step_: int = 1, *, size: int = 3) -> SplitRequest:
    return SplitRequest(round=1, step=step_, gradient=np.ones((2, size), np.float32))


def process(channel: NodeChannel, node: int) -> int:
    reply = channel.exchange(node, SPLIT_STEP, asked())
    assert isinstance(reply, SplitReply)
    return reply.steps


@pytest.mark.parametrize("size", [3, 500_000], ids=["with the call", "in Ray's store"])
def test_a_request_goes_by_itself_and_hooks_see_it(grid: RayGrid, size: int) -> None:
    events: list[object] = []
    tap = Wiretap(DeterministicGrid(grid, stream=0, roster=grid.roster), [events.append])
    assert typed_call(tap, SPLIT_STEP) is not None
    assert typed_call(tap, HEAD_STEP) is None
    channel = NodeChannel(tap, timeout=60.0)
    request = asked(size=size)
    for node in grid.roster:
        channel.send(node, SPLIT_STEP, request)
    for node in grid.roster:
        reply = channel.receive(node)
        assert isinstance(reply, SplitReply)
        assert np.array_equal(reply.smashed, request.gradient)
        assert not reply.smashed.flags.writeable or size < 100  # it lies in Ray's store
    assert [type(event) for event in events] == [CutGradientDown] * 3 + [SmashedUp] * 3


def test_what_the_plan_does_not_allow_is_refused_where_it_is_made(grid: RayGrid) -> None:
    bounds = Bounds(batch_size=2, row_bytes=12, numbers=np.dtype(np.float32), held={})
    channel = NodeChannel(grid, timeout=60.0, bounds=bounds)
    with pytest.raises(NodeFailed, match=r"WireError: \d+ bytes, where the plan allows"):
        channel.exchange(1, SPLIT_STEP, asked(size=500_000))
    wide = SplitRequest(round=1, step=1, gradient=np.ones((2, 3)))
    with pytest.raises(NodeFailed, match=r"refused, unread: .* (is float64|bytes)"):
        channel.exchange(1, SPLIT_STEP, wide)
    NodeChannel(grid, timeout=60.0, bounds=Bounds())


@pytest.mark.usefixtures("grid")
def test_a_stopped_worker_never_outlasts_the_timeout_and_others_go_on() -> None:
    with RayGrid(app, nodes=2, workers=2) as grid:
        channel = NodeChannel(grid, timeout=60.0)
        stopped, other = process(channel, 1), process(channel, 2)
        assert stopped != other
        try:
            hasty = NodeChannel(grid, timeout=1.0)
            started = time.monotonic()
            hasty.send(1, SPLIT_STEP, asked(STOPPING))
            with pytest.raises(NodeFailed, match=r"no reply within 1\.0 s; raise"):
                hasty.receive(1)
            assert time.monotonic() - started < 20
            assert process(channel, 2) == other
        finally:
            os.kill(stopped, signal.SIGCONT)


MEMORY = Path("/dev/shm")  # noqa: S108  looked at, not written to


def shared_memory(process: int) -> set[Path]:
    """Files and folders in shared memory that a process looks into."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    found = [line.partition(f"{MEMORY}/")[2].removesuffix(" (deleted)") for line in lines]
    return {MEMORY / path.partition("/")[0] for path in found if path}


def waits_for_its_head(process: int) -> bool:
    """Whether it is one of Ray's two agents, which wait a minute for its head to come back."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"agent" in b" ".join(command[:3]).lower()


DRIVER = """
import sys, threading
sys.path.insert(0, {root!r})
from leakbed.flower_internals import task_identity
from leakbed.grids.ray.grid import RayGrid
import numpy as np
from leakbed.wire.messages import SPLIT_STEP, SplitRequest
from strategies.node_session import NodeChannel
from tests.support.strange_nodes import app

with task_identity(), RayGrid(app, nodes=1, workers=1) as grid:
    request = SplitRequest(round=1, step=1, gradient=np.ones((2, 500_000), np.float32))
    print(NodeChannel(grid, timeout=60.0).exchange(1, SPLIT_STEP, request).steps, flush=True)
    threading.Event().wait()
"""


def test_a_killed_driver_leaves_no_process_and_nothing_in_shared_memory() -> None:
    command = [sys.executable, "-c", DRIVER.format(root=str(ROOT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:  # noqa: S603
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        started = descendants(driver.pid)
        started = {process for process in started if not waits_for_its_head(process)}
        seen = set[Path]().union(*map(shared_memory, [driver.pid, *started]))
        driver.kill()
    assert worker in started
    assert seen
    until(lambda: not any(map(running, started)))
    until(lambda: not any(path.exists() for path in seen))
