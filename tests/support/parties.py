"""Feature parties that know their strips, for tests of vertical split learning."""

from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from clients import node_app
from clients.node import TrainingPlan
from leakbed.data.partitioning import strip_architecture
from leakbed.grids import LocalGrid
from leakbed.models import Architecture
from leakbed.seeds import derive
from leakbed.wire.messages import SETUP
from strategies.server_model import TopTrainer
from strategies.vertical_split import VerticalSplit, party_architectures
from tests.support import tiny

ORDER = derive(tiny.SEED, "order")
Weights = dict[str, Tensor]


def network(name: str, cut: int) -> Architecture:
    return Architecture(
        name=f"tests.support.strip_models:{name}",
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=tiny.CLASSES,
        cut=cut,
    )


def plan(**settings: Any) -> TrainingPlan:
    return tiny.plan(labels="server", **settings)


def ready(
    nodes: int,
    architecture: Architecture,
    settings: TrainingPlan,
    *,
    resident: bool = True,
    orders: tuple[int | None, ...] = (),
) -> Any:
    """A grid in this process whose parties know their strips."""
    grid = LocalGrid(node_app, nodes=nodes)
    chosen: Any = grid if resident else tiny.Forgetful(grid)
    return told(chosen, architecture, settings, orders=orders)


def told(
    grid: Any,
    architecture: Architecture,
    settings: TrainingPlan,
    *,
    orders: tuple[int | None, ...] = (),
    **more: Any,
) -> Any:
    """The grid, once its parties know their strips; ``more`` are fields of their cells."""
    nodes = len(grid.roster)
    shared = (None,) if nodes == 1 else (ORDER,) * nodes
    for (node, party), order in zip(grid.roster.items(), orders or shared, strict=True):
        cell = tiny.cell(
            party,
            nodes,
            data=tiny.recipe(nodes, partition="aligned"),
            architecture=strip_architecture(architecture, party=party, parties=nodes),
            plan=settings,
            order_stream=order,
            **more,
        )
        message = Message(RecordDict({"cell": cell.record()}), node, SETUP)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error
    return grid


def labels() -> Tensor:
    """The label party's, by the rows' common ids."""
    recipe = tiny.recipe(1, partition="aligned")
    return recipe.dataset().labels[recipe.split().private]


def strategy(
    nodes: int,
    architecture: Architecture,
    settings: TrainingPlan,
    *,
    weights: list[Weights] | None = None,
    merge: str = "concat",
    **more: Any,
) -> VerticalSplit:
    parties = party_architectures(architecture, nodes=nodes, merge=merge)
    parts = architecture.parts(derive(tiny.SEED, "victim-init"))
    fresh = [dict(parts.bottom.state_dict())]
    if nodes > 1:
        fresh = [dict(party.bottom(index).state_dict()) for index, party in enumerate(parties)]
    return VerticalSplit(
        TopTrainer(parts.top, settings.optimiser(parts.top.parameters())),
        [{n: v.numpy() for n, v in each.items()} for each in weights or fresh],
        shapes=[party.smashed_shape for party in parties],
        merge=merge,
        **{"labels": dict.fromkeys(range(1, nodes + 1), labels()), **more},
    )


def train(grid: Any, chosen: VerticalSplit, *, rounds: int = 2) -> tuple[list[Weights], Weights]:
    """The bottoms and the top in the end."""
    result = chosen.start(grid, chosen.part.arrays(), num_rounds=rounds)
    assert {metrics["num-examples"] for metrics in result.train_metrics_clientapp.values()} == {24}
    bottoms = [{n: torch.tensor(v) for n, v in each.items()} for each in chosen.weights]
    return bottoms, dict(chosen.part.module.state_dict())
