"""Tap an app under whatever Flower this Python has: nothing but Flower, NumPy and leakbed.tap.

    python -m tests.support.tapped_anywhere FOLDER

Prints Flower's version, and fails unless the app ends in the same bits as untapped and its trace
holds every update.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from leakbed.events import UpdateUp
from leakbed.tap import Trace, tapped

NODES = (1, 2)


def identify() -> None:
    """Do what a Flower runtime does since 1.37, without which no message can be made."""
    try:
        from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415
    except ImportError:
        return
    holder: Any = TaskIdentity
    for name in ("_run_id", "_task_id", "_node_id"):
        setattr(holder, name, 1)


def context(run_id: int = 1, *, node: int = 0) -> Context:
    return Context(run_id=run_id, node_id=node, node_config={}, state=RecordDict(), run_config={})


def client() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = RecordDict({"arrays": ArrayRecord([a + context.node_id for a in arrays])})
        content["metrics"] = MetricRecord({"num-examples": context.node_id})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


class OwnGrid(Grid):
    """Two nodes in this process."""

    def __init__(self) -> None:
        self._app = client()
        self._sent: dict[str, Message] = {}

    def set_run(self, *args: Any, **kwargs: Any) -> None:
        """Know of no run."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return NODES

    def get_nodes(self) -> Iterable[Any]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [self._sent.pop(each) for each in message_ids]
        return [self._app(each, context(node=each.metadata.dst_node_id)) for each in asked]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def server(found: list[bytes]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        weights = ArrayRecord([np.ones((2, 3), np.float32)])
        result = FedAvg().start(grid=grid, initial_arrays=weights, num_rounds=2)
        (array,) = result.arrays.to_numpy_ndarrays()
        found.append(array.tobytes())

    return app


def main(folder: Path) -> None:
    identify()
    plain: list[bytes] = []
    recorded: list[bytes] = []
    server(plain)(OwnGrid(), context())
    app = tapped(server(recorded), folder, strict=True)
    for run_id in (1, 2):
        app(OwnGrid(), context(run_id))
    if recorded != plain * 2:
        raise SystemExit("the tapped app ended in other bits")
    for run_id in (1, 2):
        trace = Trace(folder / str(run_id))
        updates: list[Any] = list(trace.events(UpdateUp))
        seen = sorted((each.round, each.node, each.examples) for each in updates)
        if seen != [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)]:
            raise SystemExit(f"the trace holds {seen}")
    sys.stdout.write(f"flwr {version('flwr')}: tapped\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
