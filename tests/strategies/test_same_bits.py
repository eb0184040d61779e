"""Training ends in the same bits however late each node answers.

tests/experiments/test_same_traces.py compares grids.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from leakbed.events import Event, SmashedUp, UpdateUp
from leakbed.grids import DeterministicGrid, LocalGrid
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import SETUP
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit
from tests.support import slow_nodes, tiny

pytestmark = pytest.mark.usefixtures("identity")

NODES, ROUNDS, FRACTION = 5, 3, 0.6
ARCHITECTURES = {
    "plain": tiny.architecture("plain"),
    "stateful": replace(tiny.architecture("stateful"), name="tests.support.slow_nodes:stateful"),
}
PLAN = tiny.plan(batch_size=2, momentum=0.9)

Weights = dict[str, Tensor]
Train = Callable[[Grid], Weights]


def recipe() -> Any:
    """Nodes that own one to five shares of the rows."""
    return tiny.recipe(NODES, partition="linear", public=0.0)


@contextmanager
def tapped(grid: Grid, architecture: Architecture, seen: list[Event]) -> Iterator[Wiretap]:
    """The grid as the runner uses it, its nodes told their cell."""
    canonical = DeterministicGrid(
        grid, stream=derive(tiny.SEED, "sampling"), nodes=NODES, timeout=120.0
    )
    setup = []
    for node, partition in canonical.roster.items():
        cell = tiny.cell(
            partition, NODES, data=recipe(), architecture=architecture, plan=PLAN
        ).record()
        records = RecordDict({"cell": cell})
        setup.append(Message(records, dst_node_id=node, message_type=SETUP))
    canonical.send_and_receive(setup, timeout=120.0)
    with scoped(derive(tiny.SEED, "server")):
        yield Wiretap(canonical, [seen.append], roster=canonical.roster, strict=True)


def fedavg(grid: Grid, architecture: Architecture) -> Weights:
    seen: list[Event] = []
    with tapped(grid, architecture, seen) as tap:
        model = architecture.build(derive(tiny.SEED, "victim-init"))
        strategy = FedAvg(fraction_train=FRACTION, fraction_evaluate=0.0, min_available_nodes=NODES)
        result = strategy.start(tap, ArrayRecord(model.state_dict()), num_rounds=ROUNDS)
    assert sum(isinstance(event, UpdateUp) for event in seen) == 3 * ROUNDS
    return dict(result.arrays.to_torch_state_dict())


def split(grid: Grid, architecture: Architecture) -> Weights:
    seen: list[Event] = []
    with tapped(grid, architecture, seen) as tap:
        parts = architecture.parts(derive(tiny.SEED, "victim-init"))
        trainer = TopTrainer(parts.top, PLAN.optimiser(parts.top.parameters()))
        bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
        strategy = VanillaSplit(trainer, bottom, fraction_train=FRACTION, step_timeout=120.0)
        trained = tiny.train_split(tap, strategy, rounds=ROUNDS)
    steps = PLAN.local_steps or 0
    assert sum(isinstance(event, SmashedUp) for event in seen) == 3 * ROUNDS * steps
    return trained


def test_the_nodes_have_unequal_numbers_of_rows() -> None:
    sizes = {len(rows) for rows in recipe().split().nodes}
    assert len(sizes) == NODES


@pytest.mark.parametrize("network", ARCHITECTURES)
@pytest.mark.parametrize("train", [fedavg, split])
def test_a_repetition_in_one_process_has_the_same_bits(
    train: Callable[..., Weights], network: str
) -> None:
    trained = []
    for seed in range(2):
        random.seed(seed)
        torch.manual_seed(seed)
        grid = LocalGrid(slow_nodes.app, nodes=NODES)
        trained.append(train(grid, ARCHITECTURES[network]))
    assert tiny.same(*trained)
    first = ARCHITECTURES[network].build(derive(tiny.SEED, "victim-init")).state_dict()
    assert not tiny.same(trained[0], first)
