"""Seconds per hijacked split step through LocalGrid, beside the rehearsal of the same attack.

One node trains ``two-blocks`` with batches of 64 under feature-space hijacking with small networks:
through Flower's messages, the wiretap and an honest server's own training on LocalGrid, and in the
plain loop of :func:`leakbed.hijack.rehearse`. Both sides take turns, each in a process of its own.

Run alone with ``python -m benchmarks.hijacked_steps``, or by ``make bench``. One JSON object a
line.
"""

import logging
import sys
from contextlib import ExitStack
from time import perf_counter

import torch

from attacks.feature_space_hijacking import SMALL, FeatureSpaceHijacking
from benchmarks.paired import Turns, line, rounds, show, together
from benchmarks.split_steps import Size, serve
from clients import node_app
from experiments.run.view import initial_view
from leakbed.contracts import View
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.hijack import Hijack, rehearse
from leakbed.tap.wiretap import Wiretap

WARM, RUNS = 1, 7
SIZE = Size(network="two-blocks", steps=12, optimizer="adam", learning_rate=1e-3)
FSHA = FeatureSpaceHijacking(**SMALL)  # type: ignore[arg-type]  a table of settings


def opening(size: Size) -> View:
    """Return what the hijacker knows before training."""
    images, labels = size.data.owned()
    return initial_view(
        FSHA.threat,
        size.architecture,
        rows=size.batch,
        public={"images": images.numpy(), "labels": labels.numpy()},
        device=torch.device("cpu"),
    )


def local(size: Size, turns: Turns) -> None:
    """Hijack one round of training through LocalGrid at each turn."""
    hijack = Hijack(FSHA, opening(size), seed=0)
    with task_identity():
        grid = LocalGrid(node_app, nodes=1)
        serve(Wiretap(grid, active=hijack, strict=True), size, turns)


def rehearsal(size: Size, turns: Turns) -> None:
    """Rehearse as many steps at each turn."""
    cell, known = size.cell(0), opening(size)
    images, _ = cell.rows()
    batches = [images[rows] for rows in cell.batches(1, len(images))]
    bottom, ended = size.architecture.bottom(0), list[float]()
    turns.tell()
    while turns.wait():
        ended.clear()
        rehearse(
            bottom,
            FSHA,
            [batches[0], *batches],  # the end of the first step starts the clock
            view=known,
            seed=0,
            optimiser=cell.plan.optimiser,
            watch=lambda *_: ended.append(perf_counter()),
        )
        turns.tell(rate=size.steps / (ended[-1] - ended[0]))


SIDES = {"local": local, "rehearsal": rehearsal}


def main() -> None:
    """Be a side, if told which; else measure and print the line."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if len(sys.argv) > 1:
        SIDES[sys.argv[1]](SIZE, Turns())
        return
    base = [sys.executable, "-m", "benchmarks.hijacked_steps"]
    commands = {"ours": [*base, "local"], "other": [*base, "rehearsal"]}
    with ExitStack() as stack:
        taken = rounds(together(commands, stack), warm=WARM, runs=RUNS)
    pairs = [(1 / turn["ours"]["rate"], 1 / turn["other"]["rate"]) for turn in taken]
    what = f"hijacked split step, two-blocks, batch {SIZE.batch}: LocalGrid / rehearsal"
    show(line(what, pairs, unit="s"))


if __name__ == "__main__":
    main()
