"""Seconds per FedAvg round with 1,000 nodes: RayGrid, Flower's Simulation Runtime and pfl.

Flower's own FedAvg and the node app of this repository run unchanged on both grids, on two workers
of one CPU each, and must end in the same weights. pfl 0.6 runs the same network on the same rows,
as one process on all cores and as two processes of one thread; it needs an environment of its own,
whose interpreter ``LEAKBED_BENCH_PFL`` names (``pip install 'pfl[pytorch]==0.6.0'``).

Run alone with ``python -m benchmarks.fedavg_round``, or by ``make bench``. One JSON object a line.

Source: Granqvist et al., *pfl-research: simulation framework for accelerating research in Private
Federated Learning*, NeurIPS 2024, https://arxiv.org/abs/2404.06430: 1,000 users of 50 samples, 50
of them in a round, batches of 10, one local epoch.
"""

import hashlib
import json
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from benchmarks import federation
from benchmarks.cifar_shaped import CLASSES, IMAGE_SHAPE
from benchmarks.federation import told
from benchmarks.paired import Side, Turns, line, rounds, show, together
from clients import node_app
from clients.node import NodeConfig, TrainingPlan
from leakbed.data.config import DataConfig
from leakbed.flower_internals import task_identity
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped

WARM, RUNS, WORKERS, SEED = 2, 7, 2, 0
PFL = "LEAKBED_BENCH_PFL"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained; the default is the published benchmark."""

    nodes: int = 1000
    sampled: int = 50
    batch: int = 10
    turns: int = WARM + RUNS
    network: str = "benchmarks.cifar_shaped:network"
    data: str = "benchmarks.cifar_shaped:images"
    image_shape: tuple[int, ...] = IMAGE_SHAPE
    classes: int = CLASSES

    @property
    def architecture(self) -> Architecture:
        """The network, not cut."""
        channels, height, width = self.image_shape
        shape = (channels, height, width)
        return Architecture(name=self.network, image_shape=shape, num_classes=self.classes)

    def cell(self, partition: int) -> NodeConfig:
        """Return a node's cell: every row is some node's, all nodes have as many."""
        rows = DataConfig(name=self.data, nodes=self.nodes, stream=SEED, public=0.0, test=0.0)
        plan = TrainingPlan(batch_size=self.batch, local_steps=None, learning_rate=0.01)
        return NodeConfig(
            data=rows,
            architecture=self.architecture,
            plan=plan,
            partition=partition,
            stream=derive(SEED, f"node/{partition}"),
            defense_stream=derive(SEED, f"defence/{partition}"),
        )


def serve(grid: Grid, size: Size, turns: Turns) -> None:
    """Tell the nodes their cells, then train one round at each turn.

    Args:
        grid: Where the nodes are.
        size: How much to train.
        turns: When.
    """
    canonical = told(grid, size.cell, nodes=size.nodes, stream=SEED)
    strategy = FedAvg(
        fraction_train=size.sampled / size.nodes,
        fraction_evaluate=0.0,
        min_available_nodes=size.nodes,
    )
    started = 0.0

    def between(round_: int, arrays: ArrayRecord) -> None:
        """Answer for the round that ends here, and wait before the next."""
        nonlocal started
        ended = perf_counter()
        turns.tell(seconds=ended - started, digest=_digest(arrays))
        if round_ < size.turns:
            turns.wait()
        started = perf_counter()

    weights = ArrayRecord(size.architecture.build(derive(SEED, "victim-init")).state_dict())
    with scoped(SEED):
        strategy.start(canonical, weights, num_rounds=size.turns, evaluate_fn=between)


def on_ray(size: Size, turns: Turns) -> None:
    """Serve from a RayGrid."""
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    with task_identity(), RayGrid(node_app, nodes=size.nodes, workers=WORKERS) as grid:
        serve(grid, size, turns)


def on_flower(size: Size, turns: Turns) -> None:
    """Serve from Flower's Simulation Runtime."""
    federation.on_flower(lambda grid: serve(grid, size, turns), nodes=size.nodes, workers=WORKERS)


def measured(size: Size, *, warm: int = WARM, runs: int = RUNS) -> list[dict[str, object]]:
    """Return the lines: RayGrid against each other side that can run here.

    Args:
        size: How much to train.
        warm: Rounds of each side that do not count.
        runs: Rounds of each side that do.

    Returns:
        One line per other side.

    Raises:
        RuntimeError: If RayGrid and Flower's runtime end in other weights.
    """
    settings = json.dumps(asdict(size))
    own = [sys.executable, "-m", "benchmarks.fedavg_round"]
    commands = {
        "RayGrid": [*own, "ray", settings],
        "Flower's Simulation Runtime": [*own, "flower", settings],
        **_pfl_commands(settings),
    }
    with ExitStack() as stack:
        sides: dict[str, Side] = together(commands, stack)
        turns = rounds(sides, warm=warm, runs=runs)
    ours, flower, *_ = turns[-1].values()
    if ours["digest"] != flower["digest"]:
        raise RuntimeError("RayGrid and Flower's Simulation Runtime trained different weights")
    what = f"FedAvg round, {size.nodes} nodes, {size.sampled} sampled"
    return [
        line(
            f"{what}: RayGrid / {other}",
            [(turn["RayGrid"]["seconds"], turn[other]["seconds"]) for turn in turns],
            unit="s",
        )
        for other in list(commands)[1:]
    ]


def _pfl_commands(settings: str) -> dict[str, list[str]]:
    """Return pfl's sides; none where it is not installed."""
    python = os.environ.get(PFL)
    if not python:
        print(f"pfl: skipped: not installed ({PFL} names no interpreter)", file=sys.stderr)
        return {}
    script = str(Path(__file__).with_name("pfl_round.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    return {
        "pfl 0.6, one process, all cores": [python, script, "all-cores", settings],
        f"pfl 0.6, {WORKERS} processes": [python, *torchrun, script, "one-thread", settings],
    }


def _digest(arrays: ArrayRecord) -> str:
    digest = hashlib.sha256()
    for name, value in arrays.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def main(arguments: list[str]) -> None:
    """Measure and print the lines, or be one of the sides.

    Args:
        arguments: None, or the side's name and its size.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if not arguments:
        for result in measured(Size()):
            show(result)
        return
    side, settings = arguments
    torch.set_num_threads(1)
    fields: dict[str, Any] = json.loads(settings)
    size = Size(**fields | {"image_shape": tuple(fields["image_shape"])})
    {"ray": on_ray, "flower": on_flower}[side](size, Turns())


if __name__ == "__main__":
    main(sys.argv[1:])
