"""Ray and Flower's runtime as context managers of a grid; two processes serve the slow app."""

import gc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from threading import Event

import pytest
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tests.support import slow_nodes


@contextmanager
def on_ray(*, nodes: int) -> Iterator[Grid]:
    """Start a RayGrid."""
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    with RayGrid(slow_nodes.app, nodes=nodes, workers=2) as grid:
        yield grid


@contextmanager
def on_flower(*, nodes: int) -> Iterator[Grid]:
    """Start a simulation, whose ServerApp lends its grid."""
    from flwr.simulation import run_simulation  # noqa: PLC0415  it imports Ray

    server, lent, done = ServerApp(), Queue[Grid](), Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grid.pull_interval = 0.01  # type: ignore[attr-defined]  seconds between looks for answers
        lent.put(grid)
        done.wait()

    with ThreadPoolExecutor(1) as beside, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")  # Flower changes it for its workers
        patch.setattr("flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED", "0")
        simulation = beside.submit(
            run_simulation,
            server,
            slow_nodes.app,
            num_supernodes=nodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"address": "local", "num_cpus": 2},
            },
        )
        try:
            yield lent.get(timeout=300)
        finally:
            done.set()
            simulation.result()
    with (
        warnings.catch_warnings()
    ):  # the files that Ray leaves open, before a later test meets them
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
