"""The app's client."""

from typing import Any

import numpy as np
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from older import task  # type: ignore[import-not-found]  # the bundle's own


class FlowerClient(NumPyClient):
    """A client that trains on its one digit."""

    def __init__(self, partition: int, lr: float) -> None:
        """Load the data."""
        self.net = task.Net()
        self.images, self.labels = task.load_data(partition)
        self.lr = lr

    def fit(
        self, parameters: list[NDArray[np.float32]], config: dict[str, Any]
    ) -> tuple[list[NDArray[np.float32]], int, dict[str, Any]]:
        """Train the network on this node's data."""
        del config
        task.set_weights(self.net, parameters)
        loss = task.train(self.net, self.images, self.labels, lr=self.lr)
        return task.get_weights(self.net), len(self.images), {"train_loss": loss}


def client_fn(context: Context) -> Client:
    """Make the client of one node."""
    partition = int(context.node_config["partition-id"])
    return FlowerClient(partition, float(context.run_config["learning-rate"])).to_client()


app = ClientApp(client_fn)
