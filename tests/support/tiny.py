"""A cell small enough for unit tests: 60 images of 6x6 pixels, networks with every kind of state.

Data set and networks are reached by import path, as a user's own would be.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from torch import Tensor, nn

import clients.node
import clients.trainer
from clients import node_app
from clients.node import NodeConfig, TrainingPlan
from leakbed.data.config import DataConfig
from leakbed.flower_internals import (
    CLIENT_RAISED,
    set_message_id,
    task_identity,
    with_content,
)
from leakbed.grids import LocalGrid
from leakbed.grids.base import describe
from leakbed.models import Architecture
from leakbed.seeds import derive
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.messages import SETUP
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit

SEED = 5
IMAGE_SHAPE, CLASSES = (1, 6, 6), 3


def images() -> tuple[Tensor, Tensor]:
    """Bright blobs whose place depends on the class, under noise."""
    noise = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % CLASSES
    for row, label in enumerate(labels.tolist()):
        noise[row, :, 2 * label : 2 * label + 2] += 1
    return noise / 2, labels


def plain() -> nn.Sequential:
    """Layers without buffers or randomness; cut 1."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


def ending_in_softmax() -> nn.Sequential:
    """As ``plain``, but what it returns are probabilities; cut 1."""
    return plain().append(nn.Softmax(1))


def stateful() -> nn.Sequential:
    """BatchNorm and dropout in the bottom, BatchNorm in the top; cut 3."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def architecture(name: str = "plain") -> Architecture:
    cut = {"plain": 1, "stateful": 3}[name]
    return Architecture(
        name=f"tests.support.tiny:{name}", image_shape=IMAGE_SHAPE, num_classes=CLASSES, cut=cut
    )


def recipe(nodes: int = 1, **settings: Any) -> DataConfig:
    stream = derive(SEED, "data")
    return DataConfig(
        name="tests.support.tiny:images", nodes=nodes, stream=stream, test=0.1, **settings
    )


def plan(**settings: Any) -> TrainingPlan:
    chosen = {"batch_size": 8, "local_steps": 3, "learning_rate": 0.1} | settings
    return TrainingPlan(**chosen)


def cell(partition: int = 0, nodes: int = 1, model: str = "plain", **settings: Any) -> NodeConfig:
    chosen = {
        "data": recipe(nodes),
        "architecture": architecture(model),
        "plan": plan(),
        "partition": partition,
        "stream": derive(SEED, f"node/{partition}"),
        "defense_stream": derive(SEED, f"defence/{partition}"),
        "device": "cpu",
    } | settings
    return NodeConfig(**chosen)


def set_up(grid: Any, nodes: int = 1, **settings: Any) -> None:
    """Tell every node of a local grid its cell, as the harness does."""
    for node, partition in grid.roster.items():
        records = RecordDict({"cell": cell(partition, nodes, **settings).record()})
        message = Message(records, dst_node_id=node, message_type=SETUP)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error


def ready(nodes: int = 1, *, resident: bool = True, **settings: Any) -> Any:
    """A grid whose nodes know their cell."""
    grid = LocalGrid(node_app, nodes=nodes)
    chosen = grid if resident else Forgetful(grid)
    set_up(chosen, nodes, **settings)
    return chosen


class Forgetful(GridWrapper):
    """Flower's own runtimes in small: each message meets a new process that knows only the state.

    Contexts and messages go through protobuf, as between Flower's processes.
    """

    def __init__(self, grid: LocalGrid) -> None:
        super().__init__(grid)
        self._stored: dict[int, Any] = {}
        self._waiting: dict[str, Message] = {}
        self._count = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for message in sent:
            self._count += 1
            set_message_id(message, f"forgetful-{self._count}")
            self._waiting[message.metadata.message_id] = message
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answer(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        clients.node._parsed.cache_clear()
        clients.node._rows.cache_clear()
        clients.trainer._template.cache_clear()
        node = message.metadata.dst_node_id
        stored = self._stored.get(node)
        context = context_from_proto(stored) if stored else _new(node, _listed(message))
        try:
            reply = node_app(_sent(message), context)
        except Exception as error:  # noqa: BLE001  Flower's runtimes answer with it too
            return Message(Error(CLIENT_RAISED, describe(error)), reply_to=message)
        self._stored[node] = context_to_proto(context)
        return _sent(reply)


def _listed(message: Message) -> str:
    """The import paths of a setup message: these nodes' operator is the test that sends it."""
    if message.metadata.message_type != SETUP:
        return ""
    cell = json.loads(str(message.content.config_records["cell"]["json"]))
    defenses = (name for name, _ in cell["defenses"] if ":" in name)
    named = (
        *(cell["data"]["name"], cell["data"]["public_from"], cell["architecture"]["name"]),
        *(cell["protocol"], *defenses),
    )
    return ",".join(filter(None, named))


def _new(node: int, listed: str) -> Context:
    config: dict[str, Any] = {"partition-id": node - 1, "import-paths": listed}
    return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})


def _sent(message: Message) -> Message:
    content = recorddict_from_proto(recorddict_to_proto(message.content))
    return with_content(message, content)


@contextmanager
def identity() -> Iterator[None]:
    """Let this process create messages, with Flower's own log off."""
    with task_identity():
        yield


def split_strategy(model: str = "plain", *, settings: TrainingPlan, **more: Any) -> VanillaSplit:
    """Vanilla split learning from the victim's own initial weights."""
    parts = architecture(model).parts(derive(SEED, "victim-init"))
    trainer = TopTrainer(parts.top, settings.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
    return VanillaSplit(trainer, bottom, bottoms=settings.bottoms, **more)


def train_split(grid: Any, strategy: VanillaSplit, *, rounds: int = 2) -> dict[str, Tensor]:
    """Run the strategy; return the whole model's weights and buffers."""
    strategy.start(grid, strategy.part.arrays(), num_rounds=rounds)
    bottom = {name: torch.from_numpy(value) for name, value in strategy.bottom.items()}
    return bottom | strategy.part.module.state_dict()


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal names and equal bits, on whatever device."""
    return left.keys() == right.keys() and all(
        torch.equal(left[n].cpu(), right[n].cpu()) for n in left
    )
