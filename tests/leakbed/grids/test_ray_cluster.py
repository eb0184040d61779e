"""A Ray cluster of two machines, played by two raylets on this one, that loses one of them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from flwr.app import ConfigRecord, RecordDict
from ray.cluster_utils import Cluster

from leakbed.flower_internals import task_identity
from leakbed.grids.ray.grid import RayGrid
from tests.support import strange_nodes
from tests.support.ray_cluster import cluster_here
from tests.support.strange_nodes import message, said
from tests.support.waiting import running, until

pytestmark = pytest.mark.runtime


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with cluster_here() as made:
        yield made


def machines(grid: RayGrid) -> list[str]:
    """Where each worker is."""
    assert grid._pool is not None
    inside = [
        worker.actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
        for worker in grid._pool.workers
    ]
    return list(ray.get(inside))


def test_a_cluster_that_loses_a_machine_goes_on_with_the_other(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with task_identity(), RayGrid(strange_nodes.app, nodes=6, address="auto") as grid:
        assert grid.workers == 2  # as many as the cluster's CPUs
        assert len(set(machines(grid))) == 2
        assert second.node_id in machines(grid)
        home = [message(node, "remember") for node in range(1, 7)]
        assert [said(reply)["calls"] for reply in grid.send_and_receive(home)] == [1] * 6
        config = RecordDict({"config": ConfigRecord({"folder": str(tmp_path)})})
        pushed = list(grid.push_messages([message(node, "attend", config) for node in (1, 2)]))
        left = [tmp_path / "node-1", tmp_path / "node-2"]
        until(lambda: all(path.exists() for path in left))
        processes = [int(path.read_text()) for path in left]
        cluster.remove_node(second, allow_graceful=False)
        until(lambda: not all(map(running, processes)))  # a worker outlives its raylet a little
        (tmp_path / "go").touch()
        found = []
        deadline = time.monotonic() + 60
        while len(found) < 2:
            assert time.monotonic() < deadline, "it hangs"
            found += grid.pull_messages(pushed)
        assert sorted(said(reply)["node"] for reply in found) == [1, 2]
        assert "is gone" in caplog.text
        # There is no room for another worker, so that the one left serves all, and not for ever
        # slower: what the lost machine's nodes remember was home.
        later = list(grid.send_and_receive([message(n, "remember") for n in range(1, 7)]))
        assert [said(reply)["calls"] for reply in later] == [3, 3, 2, 2, 2, 2]
    assert not ray.is_initialized()


def test_without_an_address_a_grid_starts_its_own(cluster: Cluster) -> None:
    with task_identity(), RayGrid(strange_nodes.app, nodes=1, workers=1) as grid:
        assert set(machines(grid)).isdisjoint({cluster.head_node.node_id})
        assert {node["NodeID"] for node in ray.nodes()} == set(machines(grid))
