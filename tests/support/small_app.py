"""Somebody else's Flower app that trains a network of theirs: run a tapped ServerApp against it.

    python -m tests.support.small_app server_app.py mine:Net 1,28,28

Its nodes have two random images each; torch and Flower, nothing of ours but the grid.
"""

import runpy
import sys
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.lookup import import_object

NODES, ROWS, CLASSES = 2, 2, 10


def network(model: str, image_shape: tuple[int, ...]) -> nn.Module:
    """Return their network with fresh weights."""
    kind: Any = import_object(model)
    made: nn.Module = kind(image_shape=image_shape, num_classes=CLASSES)
    return made


def client_app(model: str, image_shape: tuple[int, ...]) -> ClientApp:
    """Return their client: one step of gradient descent on all it has."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = network(model, image_shape)
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        images = torch.rand(ROWS, *image_shape)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        nn.functional.cross_entropy(net(images), torch.arange(ROWS)).backward()
        optimiser.step()
        content = RecordDict({"arrays": ArrayRecord(net.state_dict())})
        content["metrics"] = MetricRecord({"num-examples": ROWS})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": ROWS, "loss": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run(server_app: Any, model: str, image_shape: tuple[int, ...]) -> None:
    """Run a ServerApp on a grid in this process."""
    grid = LocalGrid(client_app(model, image_shape), nodes=NODES)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with task_identity():
        server_app(grid, context)


if __name__ == "__main__":
    sys.path.insert(0, "")
    shown = runpy.run_path(sys.argv[1])
    run(shown["app"], sys.argv[2], tuple(map(int, sys.argv[3].split(","))))
