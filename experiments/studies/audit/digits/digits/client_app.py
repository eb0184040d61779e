"""The app's client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader

from digits import task  # type: ignore[import-not-found]  # the bundle's own

app = ClientApp()


def _given(message: Message, context: Context) -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]:
    """Return the network as the server sent it, and this node's data."""
    net = task.Net()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    config, node = context.run_config, context.node_config
    loader = task.load_data(
        int(node["partition-id"]),
        int(node["num-partitions"]),
        batch_size=int(config["batch-size"]),
        rows=int(config["rows"]),
    )
    return net, loader


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the network on this node's data."""
    net, loader = _given(message, context)
    epochs, lr = int(context.run_config["local-epochs"]), float(context.run_config["learning-rate"])
    loss = task.train(net, loader, epochs=epochs, lr=lr)
    metrics = MetricRecord({"train_loss": loss, "num-examples": int(context.run_config["rows"])})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the network on this node's data."""
    net, loader = _given(message, context)
    metrics = MetricRecord(
        {"eval_loss": task.test(net, loader), "num-examples": int(context.run_config["rows"])}
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
