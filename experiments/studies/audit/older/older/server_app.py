"""The app's server."""

import torch
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from older import task  # type: ignore[import-not-found]  # the bundle's own


def server_fn(context: Context) -> ServerAppComponents:
    """Say how to train."""
    torch.manual_seed(0)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(task.get_weights(task.Net())),
    )
    rounds = int(context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


app = ServerApp(server_fn=server_fn)
