"""Split steps per second on every grid, beside a plain PyTorch loop of the same arithmetic.

One node trains 784-256-10 or ``mnistnet`` with batches of 64 through Flower's types: on LocalGrid
against a plain loop over the same batches in one process; with a timeout against without one; and
on RayGrid against Flower's Simulation Runtime. Eight nodes train ``mnistnet`` with SplitFed v1: on
RayGrid with two workers against LocalGrid. Both sides of a line take turns, round by round, each
in a process of its own.

Run alone with ``python -m benchmarks.split_steps``, or by ``make bench``. One JSON object a line.
"""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from time import perf_counter

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import nn

from benchmarks import federation
from benchmarks.federation import told
from benchmarks.paired import Turns, line, rounds, show, together
from clients import node_app
from clients.node import NodeConfig, TrainingPlan
from leakbed.data.config import DataConfig
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.models import Architecture
from leakbed.tensors import resolve_device
from strategies import PROTOCOLS
from strategies.protocol import ProtocolSetup

WARM, RUNS = 2, 7
NETWORKS = {
    "784-256": ("benchmarks.perceptron:network", 2),
    "mnistnet": ("mnistnet", 2),
    "mnistnet cut 5": ("mnistnet", 5),
    "two-blocks": ("two-blocks", 7),
}
BOTTOMS = {"vanilla-split": "sealed", "splitfed-v1": "relayed"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one turn of a side trains: one round of a protocol.

    Attributes:
        network: A key of ``NETWORKS``.
        protocol: A key of the catalogue of protocols.
        nodes: All of them take part.
        workers: Of the Ray grid and of Flower's runtime.
        steps: Batches of each node in a round.
        batch: Rows of each batch.
        optimizer: ``"sgd"`` or ``"adam"``.
        learning_rate: Its step size.
        timeout: Seconds a node may take to answer; None for as long as it takes.
        device: Where nodes and server compute: ``"cpu"`` or ``"cuda"``.
    """

    network: str = "784-256"
    protocol: str = "vanilla-split"
    nodes: int = 1
    workers: int = 1
    steps: int = 200
    batch: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    timeout: float | None = None
    device: str = "cpu"

    @property
    def architecture(self) -> Architecture:
        """The network with its cut."""
        name, cut = NETWORKS[self.network]
        return Architecture(name=name, image_shape=(1, 28, 28), num_classes=10, cut=cut)

    @property
    def plan(self) -> TrainingPlan:
        """How its nodes train."""
        return TrainingPlan(
            batch_size=self.batch,
            local_steps=self.steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            bottoms=BOTTOMS[self.protocol],
        )

    @property
    def data(self) -> DataConfig:
        """Their rows."""
        return DataConfig(name="mnist-5k", nodes=self.nodes, stream=0)

    def cell(self, partition: int) -> NodeConfig:
        """Return what a node is told."""
        return NodeConfig(
            data=self.data,
            architecture=self.architecture,
            plan=self.plan,
            partition=partition,
            stream=partition,
            defense_stream=partition,
            device=self.device,
        )


def serve(grid: Grid, size: Size, turns: Turns) -> None:
    """Tell the nodes their cells, then train one round at each turn.

    Args:
        grid: Where the nodes are.
        size: What to train.
        turns: When.
    """
    canonical = told(grid, size.cell, nodes=size.nodes, stream=0)
    entry = PROTOCOLS[size.protocol]
    built = entry.build(
        ProtocolSetup(
            architecture=size.architecture,
            init_stream=0,
            optimiser=size.plan.optimiser,
            nodes=size.nodes,
            fraction=1.0,
            chosen={key: legal[0] for key, legal in entry.choices.items()},
            labels=None,
            test_labels=torch.empty(0, dtype=torch.long),
            evaluate_rounds=(),
            defenses=(),
            defense_stream=0,
            timeout=size.timeout,
            device=resolve_device(size.device),
        )
    )
    turns.tell()
    arrays = built.arrays
    while turns.wait():
        started = perf_counter()
        # One round at a time, since Strategy.start logs around its rounds.
        messages = list(built.strategy.configure_train(1, arrays, ConfigRecord(), canonical))
        replies = canonical.send_and_receive(messages)
        built.strategy.aggregate_train(1, replies)
        turns.tell(rate=size.nodes * size.steps / (perf_counter() - started))


def plain(size: Size, turns: Turns) -> None:
    """Take the same steps, on the same batches in the same order, in one process without a message.

    Args:
        size: What to train, with one node.
        turns: When.
    """
    cell = size.cell(0)
    images, labels = cell.rows()
    batches = cell.batches(1, len(images))
    parts = size.architecture.parts(0)
    optimizers = [size.plan.optimiser(part.parameters()) for part in (parts.bottom, parts.top)]
    turns.tell()
    while turns.wait():
        started = perf_counter()
        for batch in batches:
            logits = parts.top(parts.bottom(images[batch]))
            loss = nn.functional.cross_entropy(logits, labels[batch])
            for optimiser in optimizers:
                optimiser.zero_grad()
            loss.backward()
            for optimiser in optimizers:
                optimiser.step()
        turns.tell(rate=size.steps / (perf_counter() - started))


def local(size: Size, turns: Turns) -> None:
    """Serve from a LocalGrid."""
    with task_identity():
        serve(LocalGrid(node_app, nodes=size.nodes), size, turns)


def ray(size: Size, turns: Turns, *, ended: Callable[[], object] = lambda: None) -> None:
    """Serve from a RayGrid; ``ended`` is called after the last turn, its workers still there."""
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    with task_identity(), RayGrid(node_app, nodes=size.nodes, workers=size.workers) as grid:
        serve(grid, size, turns)
        ended()


def flower(size: Size, turns: Turns) -> None:
    """Serve from Flower's Simulation Runtime."""
    federation.on_flower(
        lambda grid: serve(grid, size, turns), nodes=size.nodes, workers=size.workers
    )


SIDES = {"plain": plain, "local": local, "ray": ray, "flower": flower}


def compared(
    name: str,
    ours: tuple[str, Size],
    other: tuple[str, Size],
    *,
    warm: int = WARM,
    runs: int = RUNS,
) -> dict[str, object]:
    """Return the line of two sides that take turns.

    Args:
        name: What is measured.
        ours: Key of ``SIDES``, and what it trains.
        other: Likewise.
        warm: Turns of each that do not count.
        runs: Turns of each that do.

    Returns:
        Steps per second of both.
    """
    commands = {
        who: [sys.executable, "-m", "benchmarks.split_steps", side, json.dumps(asdict(size))]
        for who, (side, size) in {"ours": ours, "other": other}.items()
    }
    with ExitStack() as stack:
        taken = rounds(together(commands, stack), warm=warm, runs=runs)
    pairs = [(turn["ours"]["rate"], turn["other"]["rate"]) for turn in taken]
    return line(name, pairs, unit="steps/s")


def main() -> None:
    """Be a side, if told which; else measure and print the lines."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if len(sys.argv) > 1:
        SIDES[sys.argv[1]](Size(**json.loads(sys.argv[2])), Turns())
        return
    for network in ("784-256", "mnistnet"):
        size = Size(network=network)
        what = f"split steps, {network}, batch {size.batch}: LocalGrid / plain loop"
        show(compared(what, ("local", size), ("plain", size)))
    usual = Size(timeout=3600.0)  # of settings that name none
    what = f"split steps, 784-256, batch {usual.batch}: LocalGrid, usual timeout / none"
    show(compared(what, ("local", usual), ("local", Size())))
    one, few = Size(), Size(steps=10)  # the runtime takes 0.1 s a step
    what = f"split steps, 784-256, batch {one.batch}: RayGrid / Flower's Simulation Runtime"
    show(compared(what, ("ray", one), ("flower", few)))
    for network in ("mnistnet", "mnistnet cut 5"):
        eight = Size(network=network, protocol="splitfed-v1", nodes=8, workers=2, steps=20)
        what = f"split steps, SplitFed v1, 8 nodes, {network}: RayGrid, 2 workers / LocalGrid"
        show(compared(what, ("ray", eight), ("local", eight)))


if __name__ == "__main__":
    main()
