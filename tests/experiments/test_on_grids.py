"""What holds on LocalGrid holds on Ray and on Flower's runtime too; each is started once for all.

Every protocol is its definition: networks of one node have dropout and BatchNorm and must agree bit
for bit; where sums of several nodes come in another order, float64 and 1e-10. It leaves the same
trace as on LocalGrid. Nodes whose data are not the experiment's end the run.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import Grid

from leakbed.events import CutGradientDown, Event
from leakbed.grids import DeterministicGrid
from leakbed.grids.deterministic import ask_roster
from leakbed.provenance import OtherInputsError
from leakbed.seeds import derive, scoped
from tests.experiments import test_same_traces as traces
from tests.support import double_models, several_nodes, tiny, u_shaped
from tests.support.definitions import Weights, concatenated, interleaved, left, order, uncut
from tests.support.runtimes import on_flower, on_ray
from tests.support.several_nodes import NODES, OPTIMISERS, distance, plan

# Flower 1.41 leaves files open and Ray announces a default it will change: neither is ours.
pytestmark = [
    pytest.mark.runtime,
    pytest.mark.usefixtures("identity"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip:FutureWarning"),
]
STATEFUL = tiny.architecture("stateful")
ONE: dict[str, Any] = {"nodes": 1, "model": STATEFUL}
MOMENTUM, PLAIN = OPTIMISERS["momentum"], OPTIMISERS["plain"]

Train = Callable[..., Weights]
Pair = tuple[Weights, Weights]


def one_node(train: Train, protocol: str, **options: str) -> Pair:
    settings = plan(**MOMENTUM)
    if protocol == "vertical-split":
        settings = replace(settings, labels="server", bottoms="sealed")
    expected = uncut(several_nodes.cells(plan(**MOMENTUM), **ONE)[0], rounds=2)
    return train(protocol, settings, **ONE, options=options), expected


def both_ends_at_the_node(train: Train) -> Pair:
    settings = plan(**MOMENTUM, labels="client", bottoms="sealed")
    model = u_shaped.network("normed")
    found = train("u-shaped", settings, nodes=1, model=model)
    whole = replace(model, upper_cut=None)
    return found, uncut(several_nodes.cells(plan(**MOMENTUM), nodes=1, model=whole)[0], rounds=2)


def averaged(train: Train) -> Pair:
    settings = plan(**PLAIN, local_steps=None, optimizer_state="fresh")
    model = double_models.architecture(cut=3)
    found = train("splitfed-v1", settings, model=model)
    return found, several_nodes.trained("fedavg", settings)


def averaged_here(train: Train) -> Pair:
    settings = plan(**PLAIN, local_steps=None, optimizer_state="fresh")
    return train("fedavg", settings), several_nodes.trained("fedavg", settings)


def in_step(train: Train) -> Pair:
    settings = plan(**MOMENTUM, local_steps=None)
    model = double_models.architecture(cut=3)
    found = train("parallel-split", settings, model=model, options={"sync": "step"})
    return found, concatenated(several_nodes.cells(settings), rounds=2)


def in_drawn_order(train: Train) -> Pair:
    settings, events = plan(**MOMENTUM, local_steps=None), list[Event]()
    found = train("splitfed-v2", settings, events=events)
    cells = several_nodes.cells(settings)
    sent = [event for event in events if isinstance(event, CutGradientDown)]
    for (round_, step), group in groupby(sent, key=lambda event: (event.round, event.step)):
        nodes = order(left(cells, step=step), round_=round_, step=step)
        assert [event.node for event in group] == nodes
    return found, interleaved(cells, rounds=2)


BIT_FOR_BIT: dict[str, Callable[[Train], Pair]] = {
    "vanilla-split": partial(one_node, protocol="vanilla-split"),
    "u-shaped": both_ends_at_the_node,
    "splitfed-v1": partial(one_node, protocol="splitfed-v1"),
    "splitfed-v2": partial(one_node, protocol="splitfed-v2"),
    "parallel-split, round": partial(one_node, protocol="parallel-split", sync="round"),
    "parallel-split, step": partial(one_node, protocol="parallel-split", sync="step"),
    "vertical-split": partial(one_node, protocol="vertical-split"),
    "fedavg": averaged_here,
}
NEARLY: dict[str, Callable[[Train], Pair]] = {
    "splitfed-v1 is FedAvg": averaged,
    "parallel-split in step is the concatenated batch": in_step,
    "splitfed-v2 is the paper's loop": in_drawn_order,
}


def training_on(grid: Grid) -> Train:
    """Train on some grid's first nodes."""
    there = DeterministicGrid(grid, stream=0, nodes=NODES, timeout=600.0)

    def train(protocol: str, settings: Any, *, nodes: int = NODES, **more: Any) -> Weights:
        if settings.labels == "server":
            more["labels"] = several_nodes.labels(nodes, on=there)
        with scoped(derive(tiny.SEED, "server")):
            return several_nodes.trained(protocol, settings, nodes=nodes, on=there, **more)

    return train


@pytest.fixture(scope="module", params=[on_ray, on_flower])
def grid(request: pytest.FixtureRequest) -> Iterator[Grid]:
    with request.param(nodes=NODES) as started:
        yield started


def test_every_protocol_is_its_definition(grid: Grid) -> None:
    train = training_on(grid)
    found = {name: pair(train) for name, pair in {**BIT_FOR_BIT, **NEARLY}.items()}
    assert [name for name in BIT_FOR_BIT if not tiny.same(*found[name])] == []
    off = {name: distance(*found[name]) for name in NEARLY}
    assert {name: far for name, far in off.items() if not far < 1e-10} == {}


def roster_of(grid: Grid) -> dict[int, int]:
    """The grid's first nodes, as many as the traces have."""
    return {node: p for node, p in ask_roster(grid, nodes=NODES).items() if p < traces.NODES}


def test_every_protocol_leaves_the_same(grid: Grid, tmp_path: Path) -> None:
    roster = roster_of(grid)
    for case in [*traces.CASES, *traces.STEPPED]:
        there = traces.outcome(grid, case, tmp_path / f"there {case}", roster)
        assert there == traces.locally(case, tmp_path / f"here {case}"), case


@pytest.mark.parametrize("function", ["shuffled", "numbered_by_a_set"])
def test_data_that_differ_at_a_node_end_the_run(function: str, grid: Grid, tmp_path: Path) -> None:
    other = f"data.name=tests.support.changing_data:{function}"
    with pytest.raises(OtherInputsError, match="has other data than the experiment") as caught:
        traces.outcome(grid, "fedavg", tmp_path / "run", roster_of(grid), (other,))
    assert f"data.name = 'tests.support.changing_data:{function}'" in str(caught.value)
