"""How fast a GPU attacks and trains, in absolute numbers, with the card's name beside them.

Targets a second of DLM, DLM+ and UnSplit at their published budgets, iterations a second of
feature-space hijacking with the paper's networks on its client, and steps a second of SplitFed v1
on RayGrid with 1, 2, 4 and 8 workers on each GPU; the memory each took at most. The attacks need
torch, and neither Flower nor Ray: ``python -m benchmarks.gpu attacks`` runs where those two are not
installed.

    python -m benchmarks.gpu [attacks|grids] [--device cuda] [--targets 1000] [--small]

``--small`` does next to nothing of each, which shows on any machine that all of it runs. One JSON
object a line, whose numbers of several machines are not to be compared as ratios of a pair.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks.deep_leakage_from_model import DeepLeakageFromModel
from attacks.deep_leakage_from_model_plus import DeepLeakageFromModelPlus
from attacks.feature_space_hijacking import FeatureSpaceHijacking
from attacks.unsplit import UnSplit
from leakbed.contracts import Attack, Seat, View
from leakbed.hijack import rehearse
from leakbed.models import Architecture
from leakbed.tensors import configure_torch, describe_device, peak_gpu_memory, resolve_device

WORKERS = (1, 2, 4, 8)
CLASSES = 10
DIGIT = (1, 28, 28)
PHOTOGRAPH = (3, 32, 32)
BATCH, RATE = 64, 1e-3  # of the hijacked client, as published
STEPS = 300  # of the hijacked client that are timed; the paper takes 10,000
UNSPLIT = 64  # targets

LENET = Architecture(
    name="lenet-sigmoid", initialisation="uniform", image_shape=DIGIT, num_classes=CLASSES
)
MNIST = Architecture(name="mnistnet", cut=2, image_shape=DIGIT, num_classes=CLASSES)
CLIENT = Architecture(name="fsha-resnet", cut=7, image_shape=PHOTOGRAPH, num_classes=CLASSES)


def noise(
    architecture: Architecture, *, targets: int, classes: int = CLASSES
) -> tuple[Float[Tensor, " targets *image"], Int[Tensor, " targets"]]:
    """Return images of noise, and their labels."""
    draw = torch.Generator().manual_seed(7)
    images = torch.rand(targets, *architecture.image_shape, generator=draw)
    return images, torch.arange(targets) % classes


def updates(
    architecture: Architecture, *, targets: int, device: torch.device, classes: int = CLASSES
) -> dict[str, Any]:
    """Return weights before and after a step of each target's own, as a view has them."""
    model = architecture.build(11).to(device)
    before = {name: each.detach() for name, each in model.named_parameters()}
    after: dict[str, list[Tensor]] = {name: [] for name in before}
    images, labels = (
        each.to(device) for each in noise(architecture, targets=targets, classes=classes)
    )
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(before, gradients, strict=True):
            after[name].append(before[name] - 0.1 * gradient)
    return {
        "before": {name: each.expand(targets, *each.shape) for name, each in before.items()},
        "after": {name: torch.stack(each) for name, each in after.items()},
        "buffers": {},
    }


def smashed(
    architecture: Architecture, *, targets: int, device: torch.device, classes: int = CLASSES
) -> dict[str, Any]:
    """Return the smashed data of every target, as a view has it."""
    bottom = architecture.bottom(11).to(device).eval()
    images, _ = noise(architecture, targets=targets, classes=classes)
    with torch.no_grad():
        return {"smashed": bottom(images.to(device))}


def seen(attack: Attack, architecture: Architecture, *, targets: int, device: torch.device) -> View:
    """Return what a gradient matching, or else UnSplit, is shown."""
    evidence = smashed if isinstance(attack, UnSplit) else updates
    return View(
        seat=attack.threat.seat,
        image_shape=architecture.image_shape,
        num_classes=CLASSES,
        targets=targets,
        architecture=architecture,
        device=device,
        **evidence(architecture, targets=targets, device=device),
    )


def opening(
    image_shape: tuple[int, int, int],
    smashed_shape: tuple[int, ...],
    *,
    rows: int,
    public: int,
    device: torch.device,
) -> View:
    """Return what a hijacker knows before training: images of noise, with labels and attributes."""
    draw, classes = torch.Generator().manual_seed(7), 4
    told = torch.arange(public, device=device) % classes
    return View(
        seat=Seat.SERVER,
        image_shape=image_shape,
        num_classes=classes,
        targets=0,
        rows=rows,
        public_images=torch.rand(public, *image_shape, generator=draw).to(device),
        public_labels=told,
        public_attributes=told,
        attribute_values=classes,
        smashed_shape=smashed_shape,
        device=device,
    )


def timed(device: torch.device, work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that some work took, and the most memory its tensors had on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": perf_counter() - started, **peak_gpu_memory(device)}


def attacked(device: torch.device, *, targets: int, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a line for each attack on recorded evidence."""
    short = {"iterations": 3, "restarts": 1} if small else {}
    steps = (1, 2, 2) if small else (1000, 100, 100)  # of UnSplit; else the published budget
    few = 2 if small else targets
    chosen: list[tuple[Attack, Architecture, int]] = [
        (DeepLeakageFromModel(**short), LENET, few),  # type: ignore[arg-type]  a table of settings
        (DeepLeakageFromModelPlus(**short), LENET, few),  # type: ignore[arg-type]  likewise
        (UnSplit(**dict(zip(_BUDGET, steps, strict=True))), MNIST, 2 if small else UNSPLIT),  # type: ignore[arg-type]  likewise
    ]
    for attack, architecture, count in chosen:
        view = seen(attack, architecture, targets=count, device=device)
        took = timed(device, lambda attack=attack, view=view: attack.run(view, seed=3))  # type: ignore[misc]
        rate = count / took["seconds"]
        yield {"name": attack.name, "rate": rate, "unit": "targets/s", "targets": count, **took}


_BUDGET = ("outer_steps", "input_steps", "model_steps")


def hijacked(device: torch.device, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the line of feature-space hijacking: a client's training with the paper's networks."""
    rows, steps = (2, 2) if small else (BATCH, STEPS)
    bottom = CLIENT.bottom(11).to(device)
    images, _ = noise(CLIENT, targets=rows)
    images = images.to(device)
    shape = tuple(bottom(images[:1]).shape[1:])
    view = opening(PHOTOGRAPH, shape, rows=rows, public=4 * rows, device=device)

    def train(steps: int) -> None:
        rehearse(
            bottom,
            FeatureSpaceHijacking(),
            [images] * steps,
            view=view,
            seed=0,
            optimiser=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
        )

    train(1)  # the first step of a process chooses kernels
    took = timed(device, lambda: train(steps))
    yield {
        "name": "fsha, client and attacker, paper's networks",
        "rate": steps / took["seconds"],
        "unit": "iterations/s",
        "batch": rows,
        **took,
    }


class Rounds:
    """The turns of a side in this process: one round that does not count, then those that do."""

    def __init__(self, runs: int) -> None:
        """Prepare so many rounds that count."""
        self.rates: list[float] = []
        self._left = runs + 1

    def tell(self, **answer: float) -> None:
        """Keep the rate of a round."""
        self.rates += answer.values()

    def wait(self) -> bool:
        """Say whether there is another round."""
        self._left -= 1
        return self._left >= 0


def on_ray(device: torch.device, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a line for each number of workers on a GPU; of a machine without, of workers alone."""
    from benchmarks.split_steps import Size, ray  # noqa: PLC0415  the attacks need no Flower

    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    for each in WORKERS[:1] if small else WORKERS:
        workers = each * max(1, gpus)
        size = Size(
            network="mnistnet",
            protocol="splitfed-v1",
            nodes=2 * workers,
            workers=workers,
            steps=2 if small else 50,
            device=device.type,
        )
        turns, used = Rounds(1 if small else 5), dict[str, int]()
        ray(size, turns, ended=lambda used=used: used.update(memory_in_use(device)))  # type: ignore[misc]
        rates = sorted(turns.rates[1:])
        yield {
            "name": f"split steps, SplitFed v1, mnistnet, {each} workers a GPU",
            "rate": rates[len(rates) // 2],
            "unit": "steps/s",
            "gpus": gpus,
            "workers": workers,
            **used,
        }


def memory_in_use(device: torch.device) -> dict[str, int]:
    """Return the bytes in use on the first GPU by all processes, their contexts included."""
    if device.type != "cuda":
        return {}
    free, there = torch.cuda.mem_get_info(device)
    return {"gpu_memory_in_use": there - free}


def lines(
    parts: tuple[str, ...], device: torch.device, *, targets: int, small: bool
) -> Iterator[Mapping[str, Any]]:
    """Yield the lines of some parts.

    Args:
        parts: Of ``"attacks"`` and ``"grids"``.
        device: Where it computes.
        targets: Of DLM and DLM+.
        small: Whether to do next to nothing of each.

    Yields:
        A name, a rate with its unit, and the device.
    """
    where = describe_device(device)
    if "attacks" in parts:
        for line in attacked(device, targets=targets, small=small):
            yield {**line, "device": where}
        for line in hijacked(device, small=small):
            yield {**line, "device": where}
    if "grids" in parts:
        for line in on_ray(device, small=small):
            yield {**line, "device": where}


def main() -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("part", nargs="?", choices=("attacks", "grids"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    parts = (asked.part,) if asked.part else ("attacks", "grids")
    device = resolve_device(asked.device)
    configure_torch()
    for line in lines(parts, device, targets=asked.targets, small=asked.small):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
