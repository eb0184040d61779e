"""The nodes of a benchmark: told their cells, and run on Flower's Simulation Runtime."""

from collections.abc import Callable

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients.node import NodeConfig
from leakbed.grids import DeterministicGrid
from leakbed.lookup import import_object
from leakbed.wire.messages import SETUP


class NamedApp(ClientApp):
    """An app that travels by its name, as under ``flwr run``, and not by value."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return import_object, ("clients:node_app",)


def told(
    grid: Grid, cell: Callable[[int], NodeConfig], *, nodes: int, stream: int
) -> DeterministicGrid:
    """Tell every node its cell, as the harness does before a run.

    Args:
        grid: Where the nodes are.
        cell: Of a partition.
        nodes: How many there are.
        stream: Where Flower's node sampling draws from.

    Returns:
        The grid as the harness uses it.
    """
    canonical = DeterministicGrid(grid, stream=stream, nodes=nodes)
    messages = [
        Message(RecordDict({"cell": cell(p).record()}), dst_node_id=node, message_type=SETUP)
        for node, p in canonical.roster.items()
    ]
    canonical.send_and_receive(messages)
    return canonical


def on_flower(serve: Callable[[Grid], None], *, nodes: int, workers: int) -> None:
    """Run a server on Flower's Simulation Runtime.

    Args:
        serve: Does the server's work.
        nodes: How many SuperNodes.
        workers: How many of them work at a time, on a CPU each.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415  it imports Ray

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        torch.set_num_threads(1)
        serve(grid)

    run_simulation(
        server,
        NamedApp(),
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": workers},
        },
    )
