"""Kernels launched, and waits of the CPU for the GPU, in a step of every inner loop.

Counted on a pretended GPU, so that no GPU is needed: what is counted depends on the code alone.
Each loop runs with few and with more steps; the difference is the steps' own. A kernel costs the
CPU some 6 microseconds to launch, a wait some 15 beside all that was queued: a loop of kernels
shorter than that is bound by its launches, whatever the GPU.

    PYTHONPATH=. python -m benchmarks.launches [part of a name]
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import pretended_cuda

pretended_cuda.install(1)

import torch  # noqa: E402  after the device is there
from torch import Tensor  # noqa: E402

from attacks import ADVERSARIES, ATTACKS  # noqa: E402
from benchmarks.gpu import opening, smashed, updates  # noqa: E402
from experiments.run.runner import run  # noqa: E402
from leakbed.contracts import View  # noqa: E402
from leakbed.models import Architecture  # noqa: E402
from leakbed.tensors import configure_torch  # noqa: E402

LAUNCH, WAIT = 6e-6, 15e-6  # seconds
TARGETS, CLASSES = 4, 4
CUDA = torch.device("cuda", 0)


class Loop(NamedTuple):
    """One inner loop: what runs it for some steps, and the two numbers of steps."""

    run: Callable[[int], object]
    few: int
    many: int


class Count(NamedTuple):
    """A step's own kernels and waits; ``places`` are the lines that wait."""

    kernels: float
    waits: float
    places: Mapping[str, float]


def count(loop: Loop) -> Count:
    """Return what a step of a loop launches and waits for, once what is done but once is done."""
    loop.run(loop.few)
    found = []
    for steps in (loop.few, loop.many):
        with pretended_cuda.counting() as driver:
            loop.run(steps)
        found.append((driver.kernels.total(), driver.waits.total(), Counter(driver.places)))
    steps = loop.many - loop.few
    places = found[1][2]
    places.subtract(found[0][2])
    return Count(
        kernels=(found[1][0] - found[0][0]) / steps,
        waits=(found[1][1] - found[0][1]) / steps,
        places={f"{why} at {at}": n / steps for (why, at), n in places.most_common() if n > 0},
    )


def attacked(
    name: str, architecture: Architecture, settings: Callable[[int], dict[str, Any]]
) -> Callable[[int], object]:
    """Return an attack of as many steps as it is called with."""

    def attack(steps: int) -> object:
        evidence = updates if name.startswith("dlm") else smashed
        seen = evidence(architecture, targets=TARGETS, device=CUDA, classes=CLASSES)
        chosen = ATTACKS[name](**settings(steps))
        view = View(
            seat=chosen.threat.seat,
            image_shape=architecture.image_shape,
            num_classes=CLASSES,
            targets=TARGETS,
            architecture=architecture,
            device=CUDA,
            **seen,
        )
        return chosen.run(view, seed=3)

    return attack


def hijacked(name: str) -> Callable[[int], object]:
    """Return a hijacking with the paper's networks, of as many batches as it is called with."""
    shape = (3, 16, 16)

    def hijack(steps: int) -> None:
        adversary = ADVERSARIES[name](nets="paper")
        view = opening(shape, (256, 2, 2), rows=2, public=8, device=CUDA)
        draw = torch.Generator().manual_seed(8)
        state = adversary.begin(view, seed=1)
        for _ in range(steps):
            batch = torch.randn(2, 256, 2, 2, generator=draw).to(CUDA)
            state, _ = adversary.forge(state, batch, batch)

    return hijack


def images() -> tuple[Tensor, Tensor]:
    """Return noise, as a data set of its own."""
    noise = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return noise, torch.arange(200) % CLASSES


def trained(protocol: Mapping[str, Any], *, defense: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401
    """Return the training of one node, of as many local steps as it is called with."""
    cut = {} if protocol["name"] == "fedavg" else {"cut": 2}

    def train(steps: int) -> None:
        settings = {
            "name": "launches",
            "device": "cuda",
            "data": {"name": "benchmarks.launches:images", "nodes": 1, "public": 0.1},
            "model": {"name": "mnistnet", **cut},
            "protocol": {"rounds": 1, "batch_size": 8, "local_steps": steps, **protocol},
            "attack": [{"name": "constant-image", "targets": 2}],
            "defense": [dict(defense or {"name": "none"})],
        }
        with tempfile.TemporaryDirectory() as folder:
            (card,) = run(settings, out=Path(folder))
        if card.status != "done":
            raise RuntimeError(card.why)

    return train


SMALL = {"image_shape": (1, 12, 12), "num_classes": CLASSES}
LENET = Architecture(name="lenet-sigmoid", initialisation="uniform", **SMALL)  # type: ignore[arg-type]
MNIST = Architecture(name="mnistnet", cut=2, image_shape=(1, 28, 28), num_classes=CLASSES)
BLOCKS = Architecture(name="two-blocks", cut=3, **SMALL)  # type: ignore[arg-type]
SPLIT = {"name": "vanilla-split", "labels": "server"}


def searching(history: int, **more: Any) -> Callable[[int], dict[str, Any]]:  # noqa: ANN401
    """Return settings of gradient matching by which every step does the whole work."""
    common = {"restarts": 1, "good_enough": 0.0, "patience": None, "history": history, **more}
    return lambda steps: {**common, "iterations": history + steps}


def inverting(block: str) -> Callable[[int], dict[str, Any]]:
    """Return settings of UnSplit with so many steps in one of its blocks."""
    return lambda steps: {"outer_steps": 1, "input_steps": 1, "model_steps": 1, block: steps}


LOOPS: dict[str, Loop] = {
    "dlm, L-BFGS, history 10": Loop(attacked("dlm", LENET, searching(10)), 10, 30),
    "dlm, L-BFGS, history 100": Loop(attacked("dlm", LENET, searching(100)), 10, 30),
    "dlm, Adam": Loop(attacked("dlm", LENET, searching(10, optimizer="adam")), 10, 30),
    "dlm-plus, L-BFGS, history 10": Loop(attacked("dlm-plus", LENET, searching(10)), 10, 30),
    "unsplit, input step": Loop(attacked("unsplit", MNIST, inverting("input_steps")), 2, 6),
    "unsplit, model step": Loop(attacked("unsplit", MNIST, inverting("model_steps")), 2, 6),
    "unsplit, input step, vmap": Loop(attacked("unsplit", BLOCKS, inverting("input_steps")), 2, 6),
    "fsha step, paper's networks": Loop(hijacked("fsha"), 2, 5),
    "fsha-property step, paper's networks": Loop(hijacked("fsha-property"), 2, 5),
    "fedavg step": Loop(trained({"name": "fedavg"}), 4, 12),
    "split step, sgd": Loop(trained(SPLIT), 4, 12),
    "split step, adam": Loop(trained({**SPLIT, "optimizer": "adam"}), 4, 12),
    "split step, dp-sgd": Loop(
        trained(SPLIT, defense={"name": "dp-sgd", "rate": 0.9, "steps": 100}), 4, 12
    ),
    "split step, nopeek": Loop(trained(SPLIT, defense={"name": "nopeek"}), 4, 12),
}


def table(part: str = "") -> Iterator[str]:
    """Yield one line for each loop whose name contains a part, and those for its waits."""
    for name, loop in LOOPS.items():
        if part in name:
            found = count(loop)
            least = 1e3 * (found.kernels * LAUNCH + found.waits * WAIT)
            yield f"{name}: {found.kernels:.0f} kernels, {found.waits:.1f} waits, {least:.2f} ms"
            yield from (f"    {n:.2f} {place}" for place, n in found.places.items())


if __name__ == "__main__":
    configure_torch()
    for line in table(" ".join(sys.argv[1:])):
        print(line, flush=True)
