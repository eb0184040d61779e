"""The app's server."""

import torch
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid

from secure import task  # type: ignore[import-not-found]  # the bundle's own

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train by federated averaging of masked weights."""
    torch.manual_seed(0)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(task.get_weights(task.Net())),
    )
    rounds = int(context.run_config["num-server-rounds"])
    legacy = LegacyContext(
        context=context, config=ServerConfig(num_rounds=rounds), strategy=strategy
    )
    secure = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, max_weight=1)
    DefaultWorkflow(fit_workflow=secure)(grid, legacy)
