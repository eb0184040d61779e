"""Somebody else's Flower app that normalises its pictures, with a network that cannot be cut."""

from collections.abc import Iterator
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap import tapped

SHAPE, CLASSES, NODES = (1, 6, 6), 4, 2
MEAN, STD = (0.4,), (0.25,)


class Net(nn.Module):
    """Has what lies between its layers in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, CLASSES)
        self.first = nn.Linear(36, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(images.view(-1, 36))))


def pictures() -> Tensor:
    return torch.rand(NODES, *SHAPE, generator=torch.Generator().manual_seed(1))


def fed(partition: int) -> tuple[Tensor, Tensor]:
    """What the node of a partition feeds its network."""
    normalised = (pictures() - MEAN[0]) / STD[0]
    return normalised[partition : partition + 1], torch.tensor([partition + 1])


def loader(partition: int) -> Iterator[dict[str, Tensor]]:
    images, labels = fed(partition)
    return iter([{"img": images, "label": labels}])


def unnormalised(partition: int) -> tuple[Tensor, Tensor]:
    return pictures()[partition : partition + 1] * 3, torch.tensor([partition + 1])


def too_many(partition: int) -> tuple[Tensor, Tensor]:
    images, labels = fed(partition)
    return images.repeat(3, 1, 1, 1), labels.repeat(3)


def shuffled(partition: int) -> object:
    rows = torch.utils.data.TensorDataset(*fed(partition))
    return torch.utils.data.DataLoader(rows, shuffle=True)


def client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = Net()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        images, labels = fed(int(context.node_config["partition-id"]))
        nn.functional.cross_entropy(net(images), labels).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        content = RecordDict({"arrays": ArrayRecord(net.state_dict())})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content, reply_to=message)

    return app


def recorded(folder: Path) -> Path:
    """Run it tapped and return its trace, which says nothing of its run."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=1)

    context = Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with task_identity():
        tapped(server, folder)(LocalGrid(client_app(), nodes=NODES), context)
    return folder / "7"
