"""Work on the first nodes of Ray and of Flower's runtime; two processes serve the slow app."""

import gc
import warnings
from collections.abc import Callable

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tests.support import slow_nodes


def on_ray(work: Callable[[Grid], None], *, nodes: int) -> None:
    """Work on a RayGrid."""
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    with RayGrid(slow_nodes.app, nodes=nodes, workers=2) as grid:
        work(grid)


def on_flower(work: Callable[[Grid], None], *, nodes: int) -> None:
    """Work as the ServerApp of a simulation."""
    from flwr.simulation import run_simulation  # noqa: PLC0415  it imports Ray

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        work(grid)

    run_simulation(
        server,
        slow_nodes.app,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": 2},
        },
    )
    with (
        warnings.catch_warnings()
    ):  # the files that Ray leaves open, before a later test meets them
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
