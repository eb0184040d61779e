"""Split steps per second: LocalGrid against a plain PyTorch loop of the same arithmetic.

Run alone with ``python -m benchmarks.split_steps``, or by ``make bench``. One JSON object a line.
"""

import json
import logging
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from flwr.app import Message, RecordDict
from torch import nn

from clients import node_app
from clients.cell import Cell, TrainingPlan
from leakbed.data.recipe import DataRecipe
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.models import Architecture
from leakbed.wire.messages import SETUP
from strategies.split_loop import TopTrainer, take_turn

RUNS, STEPS, BATCH = 5, 100, 64
PLAN = TrainingPlan(batch_size=BATCH, local_steps=STEPS, learning_rate=0.01)
DATA = DataRecipe(name="mnist-5k", nodes=1, stream=0)


def through_local_grid(architecture: Architecture) -> Callable[[], float]:
    """Return a measurement of one round through Flower's types."""
    grid = LocalGrid(node_app, nodes=1)
    cell = Cell(
        data=DATA, architecture=architecture, plan=PLAN, partition=0, stream=1, defence_stream=2
    )
    records = RecordDict({"cell": cell.record()})
    list(grid.send_and_receive([Message(records, dst_node_id=1, message_type=SETUP)]))
    parts = architecture.parts(0)
    trainer = TopTrainer(parts.top, PLAN.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}

    def measure() -> float:
        started = perf_counter()
        take_turn(
            grid,
            1,
            trainer,
            round_=1,
            bottom=bottom,
            bottoms="sealed",
            labels=None,
            timeout=None,
        )
        return STEPS / (perf_counter() - started)

    return measure


def plain_loop(architecture: Architecture) -> Callable[[], float]:
    """Return a measurement of the same steps in one process without any message."""
    images, labels = DATA.dataset().images[:BATCH], DATA.dataset().labels[:BATCH]
    parts = architecture.parts(0)
    optimisers = [PLAN.optimiser(part.parameters()) for part in (parts.bottom, parts.top)]

    def measure() -> float:
        started = perf_counter()
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(parts.top(parts.bottom(images)), labels)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
        return STEPS / (perf_counter() - started)

    return measure


def main() -> None:
    """Measure both in turn and print the medians."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for name, cut in (("mlp2", 1), ("mnistnet", 2)):
        architecture = Architecture(name=name, image_shape=(1, 28, 28), num_classes=10, cut=cut)
        with task_identity():
            ours, other = through_local_grid(architecture), plain_loop(architecture)
            pairs = [(ours(), other()) for _ in range(RUNS + 1)][1:]
        line = {
            "name": f"split steps, {name} cut {cut}, batch {BATCH}: LocalGrid / plain loop",
            "ours": round(median(a for a, _ in pairs), 1),
            "other": round(median(b for _, b in pairs), 1),
            "ratio": round(median(a / b for a, b in pairs), 3),
            "unit": "steps/s",
            "runs": RUNS,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
