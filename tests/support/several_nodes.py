"""Several nodes of unequal size under any protocol of the catalogue, and what they end in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from clients import node_app
from clients.node import NodeConfig, TrainingPlan
from leakbed.events import Event
from leakbed.grids import DeterministicGrid, LocalGrid
from leakbed.grids.base import node_ids
from leakbed.models import Architecture
from leakbed.seeds import derive
from leakbed.tap.wiretap import GridWrapper, Wiretap
from leakbed.wire.bounds import Bounds
from leakbed.wire.messages import SETUP
from strategies import PROTOCOLS
from strategies.protocol import BuiltProtocol, ProtocolSetup
from tests.support import double_models, tiny

NODES = 4
Weights = dict[str, Tensor]

OPTIMISERS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1},
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "learning_rate": 0.01},
}


def plan(**settings: Any) -> TrainingPlan:
    """Relayed bottoms; with ``local_steps=None`` the nodes have 2, 3, 4 and 6 batches of 4."""
    return tiny.plan(**{"batch_size": 4, "bottoms": "relayed"} | settings)


def cells(
    settings: TrainingPlan,
    *,
    nodes: int = NODES,
    model: Architecture | None = None,
    at_nodes: Sequence[tuple[str, Any]] = (),
) -> list[NodeConfig]:
    """Each node's cell; node k has k + 1 shares of the rows."""
    chosen: dict[str, Any] = {
        "plan": settings,
        "data": data(nodes),
        "architecture": model or double_models.architecture(),
        "defenses": tuple(at_nodes),
    }
    return [tiny.cell(partition, nodes, **chosen) for partition in range(nodes)]


def data(nodes: int) -> Any:
    return tiny.recipe(nodes, partition="linear", public=0.0)


def grid(
    settings: TrainingPlan,
    *,
    nodes: int = NODES,
    model: Architecture | None = None,
    resident: bool = True,
    on: DeterministicGrid | None = None,
    at_nodes: Sequence[tuple[str, Any]] = (),
) -> DeterministicGrid:
    """A canonical grid whose nodes know their cell: a new one, or the first nodes of another."""
    if on is None:
        local = LocalGrid(node_app, nodes=nodes)
        inner: Grid = local if resident else tiny.Forgetful(local)
        roster = local.roster
    else:
        inner, roster = on, {node: p for node, p in on.roster.items() if p < nodes}
    chosen = DeterministicGrid(inner, stream=derive(tiny.SEED, "sampling"), roster=roster)
    known = cells(settings, nodes=nodes, model=model, at_nodes=at_nodes)
    chosen.send_and_receive(
        [
            Message(RecordDict({"cell": known[p].record()}), dst_node_id=node, message_type=SETUP)
            for node, p in roster.items()
        ]
    )
    return chosen


def labels(nodes: int = NODES, *, on: DeterministicGrid | None = None) -> dict[int, Tensor]:
    """What a server that holds the labels holds, by Flower's node id."""
    whole = data(nodes).dataset().labels
    rows = data(nodes).split().nodes
    roster = node_ids(nodes) if on is None else on.roster
    return {node: whole[rows[p]] for node, p in roster.items() if p < nodes}


def built(
    protocol: str,
    settings: TrainingPlan,
    *,
    nodes: int = NODES,
    model: Architecture | None = None,
    **changes: Any,
) -> BuiltProtocol:
    """A protocol's server part; ``options`` add to the protocol's own defaults."""
    entry = PROTOCOLS[protocol]
    own = {name: legal[0] for name, legal in entry.options.items()}
    own |= {"bottoms": settings.bottoms, "optimizer_state": settings.optimizer_state}
    own |= changes.pop("options", {})
    fields: dict[str, Any] = {
        "architecture": model or double_models.architecture(),
        "init_stream": derive(tiny.SEED, "victim-init"),
        "optimiser": settings.optimiser,
        "nodes": nodes,
        "fraction": 1.0,
        "chosen": own,
        "labels": None,
        "test_labels": torch.zeros(0, dtype=torch.long),
        "evaluate_rounds": (),
        "defenses": (),
        "defense_stream": 0,
        "timeout": None,
        "device": torch.device("cpu"),
        "stream": derive(tiny.SEED, "server/lots"),
        "batch_size": settings.batch_size,
        "local_steps": settings.local_steps,
        **changes,
    }
    return entry.build(ProtocolSetup(**fields))


def bounds(settings: TrainingPlan) -> Bounds:
    """What a server knows of a plan."""
    return Bounds(batch_size=settings.batch_size, local_steps=settings.local_steps)


def trained(
    protocol: str,
    settings: TrainingPlan,
    *,
    rounds: int = 2,
    nodes: int = NODES,
    model: Architecture | None = None,
    resident: bool = True,
    present: Iterable[Iterable[int]] | None = None,
    events: list[Event] | None = None,
    alter: Callable[[Message], None] | None = None,
    on: DeterministicGrid | None = None,
    at_nodes: Sequence[tuple[str, Any]] = (),
    **changes: Any,
) -> Weights:
    """The whole model after training, weights and buffers.

    ``present`` says which partitions there are in each round, None all of them; ``events`` takes
    what a tap sees; ``alter`` changes replies; ``on`` is a grid to train on, None a new LocalGrid;
    ``at_nodes`` are the nodes' own defences.
    """
    settled: dict[str, Any] = {"nodes": nodes, "model": model, "at_nodes": at_nodes}
    inner = grid(settings, resident=resident, on=on, **settled)
    chosen: Grid = inner
    if present is not None:
        chosen = Present(chosen, present)
    if alter is not None:
        chosen = Altered(chosen, alter)
    if events is not None:
        chosen = Wiretap(chosen, [events.append], roster=inner.roster)
    server = built(protocol, settings, nodes=nodes, model=model, **changes)
    if present is not None and isinstance(server.strategy, FedAvg):
        server.strategy.min_available_nodes = server.strategy.min_train_nodes = 1
    result = server.strategy.start(chosen, server.arrays, num_rounds=rounds)
    return whole(server, result.arrays)


def whole(server: BuiltProtocol, arrays: ArrayRecord) -> Weights:
    """Both parts by name."""
    bottom: Mapping[str, Any] = server.bottom() if server.bottom else {}
    top: Weights = dict(arrays.to_torch_state_dict())
    return {name: torch.tensor(value) for name, value in bottom.items()} | top


class Present(GridWrapper):
    """A grid whose nodes come and go between rounds."""

    def __init__(self, inner: Grid, present: Iterable[Iterable[int]]) -> None:
        super().__init__(inner)
        self._present = [[partition + 1 for partition in nodes] for nodes in present]
        self._round = 0

    def get_node_ids(self) -> Iterable[int]:
        list(self._grid.get_node_ids())
        return self._present[min(self._round, len(self._present) - 1)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(self._noted(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(self._noted(messages), timeout=timeout)

    def _noted(self, messages: Iterable[Message]) -> list[Message]:
        sent = list(messages)
        for message in sent:
            record = message.content.config_records["config"]
            self._round = int(str(record["server-round"]))
        return sent


def distance(left: Weights, right: Weights) -> float:
    """Largest absolute difference of any number; counters included."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


class Altered(GridWrapper):
    """A grid one of whose nodes answers other records than it should."""

    def __init__(self, inner: Grid, alter: Callable[[Message], None]) -> None:
        super().__init__(inner)
        self._alter = alter

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._altered(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._altered(self._grid.send_and_receive(messages, timeout=timeout))

    def _altered(self, replies: Iterable[Message]) -> list[Message]:
        found = list(replies)
        for reply in found:
            self._alter(reply)
        return found
