"""A tiny cell with a malicious client at node 0: networks with a fourth output, and their runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from attacks.client_gan import ClientGan
from clients import node_app
from leakbed.contracts.attack import NodeView
from leakbed.grids import DeterministicGrid, LocalGrid
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.wire.messages import SAMPLES, SETUP
from leakbed.wire.records import unpack
from strategies import fedavg
from strategies import u_shaped as u_shaped_split
from strategies.protocol import ProtocolSetup
from tests.support import tiny, u_shaped

TARGET, DUMMY = 1, 3
OWN: dict[str, Any] = {"target_class": TARGET, "latent": 5, "width": 8, "generator_rate": 0.01}
STREAM = derive(tiny.SEED, "adversary/client-gan/0")


def plain() -> nn.Sequential:
    """Layers without buffers or randomness; cuts 1 and 3."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    )


def everywhere() -> nn.Sequential:
    """BatchNorm and dropout in all three parts; cuts 2 and 6."""
    return u_shaped.everywhere(outputs=4)


CUTS = {"plain": (1, 3), "everywhere": (2, 6)}


def network(name: str = "plain") -> Architecture:
    cut, upper = CUTS[name]
    return Architecture(
        name=f"tests.support.intruded:{name}",
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=4,
        cut=cut,
        upper_cut=upper,
    )


def view() -> NodeView:
    return NodeView(
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=tiny.CLASSES,
        outputs=4,
        device=torch.device("cpu"),
    )


def gan(**settings: Any) -> ClientGan:
    return ClientGan(**OWN | settings)


def set_up(grid: Any, nodes: int, own: Mapping[str, Any] | None, **settings: Any) -> None:
    """Tell every node its cell; node 0 is malicious where there are settings for it."""
    for node, partition in grid.roster.items():
        mine: dict[str, Any] = dict(settings)
        if own is not None and partition == 0:
            mine |= {"intruder": ("client-gan", OWN | own), "intruder_stream": STREAM}
        cell = tiny.cell(partition, nodes, **mine)
        message = Message(RecordDict({"cell": cell.record()}), dst_node_id=node, message_type=SETUP)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error


def train(
    own: Mapping[str, Any] | None,
    *,
    model: str = "plain",
    nodes: int = 2,
    rounds: int = 1,
    resident: bool = True,
    weights: bool = False,
    around: Callable[[Any], Any] = lambda grid: grid,
    **plan: Any,
) -> tuple[dict[str, Tensor], Any]:
    """Train U-shaped, or by FedAvg; return the model's weights and buffers, and the grid."""
    chosen = u_shaped.at_home(**plan)
    inner: Any = LocalGrid(node_app, nodes=nodes)
    inner = around(inner if resident else tiny.Forgetful(inner))
    set_up(inner, nodes, own, plan=chosen, architecture=network(model))
    grid = DeterministicGrid(inner, stream=0, roster=inner.roster)
    setup = _setup(network(model), chosen, nodes)
    built = (fedavg if weights else u_shaped_split).build(setup)
    with scoped(derive(tiny.SEED, "server")):
        result = built.strategy.start(grid, built.arrays, num_rounds=rounds)
    found = dict(result.arrays.to_torch_state_dict())
    if built.bottom is not None:
        found |= {name: torch.from_numpy(value) for name, value in built.bottom().items()}
    return found, grid


def samples(grid: Any, *, count: int = 6, node: int = 1) -> tuple[Tensor, int]:
    """Ask a malicious node, as the harness does; return its samples and how many turns it had."""
    records = RecordDict({"config": ConfigRecord({"count": count})})
    message = Message(records, dst_node_id=node, message_type=SAMPLES)
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error(), reply.error
    images = unpack(reply.content.array_records["arrays"])["images"]
    return torch.from_numpy(images), int(reply.content.metric_records["metrics"]["turns"])


def _setup(architecture: Architecture, plan: Any, nodes: int) -> ProtocolSetup:
    return ProtocolSetup(
        architecture=architecture,
        init_stream=derive(tiny.SEED, "victim-init"),
        optimiser=plan.optimiser,
        nodes=nodes,
        fraction=1.0,
        chosen={"bottoms": "sealed", "optimizer_state": "kept"},
        labels=None,
        test_labels=torch.empty(0, dtype=torch.long),
        evaluate_rounds=(),
        defenses=(),
        defense_stream=0,
        timeout=None,
        device=torch.device("cpu"),
    )


def first_weights(model: str = "plain") -> nn.Sequential:
    """The victim's whole network before training."""
    return network(model).build(derive(tiny.SEED, "victim-init"))
