"""Small victims to hold UnSplit to its literal reading on."""

import torch
from torch import Tensor, nn

from leakbed.contracts import Seat, View
from leakbed.models import Architecture
from leakbed.seeds import derive, generator

SEED = 4
DIGIT = (1, 28, 28)


def architecture(cut: int, name: str = "mnistnet") -> Architecture:
    shape = (3, 8, 8) if name == "cifarnet" else DIGIT
    return Architecture(name=name, image_shape=shape, num_classes=10, cut=cut)


def used_twice() -> nn.Sequential:
    """A network whose bottom uses a layer and an activation twice; cut 3."""
    layer, activation = nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid()
    return nn.Sequential(layer, activation, layer, activation, nn.Flatten(), nn.Linear(784, 10))


def images(count: int, shape: tuple[int, int, int] = DIGIT) -> Tensor:
    coarse = torch.rand(count, shape[0], 7, 7, generator=generator(8))
    return nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")


def view_of(
    victim: nn.Module, private: Tensor, layers: Architecture, dtype: torch.dtype = torch.float32
) -> View:
    with torch.no_grad():
        smashed = victim.to(dtype)(private.to(dtype))
    return View(
        seat=Seat.SERVER,
        image_shape=layers.image_shape,
        num_classes=10,
        targets=len(private),
        smashed=smashed,
        architecture=layers,
    )


def small_view(cut: int = 1, targets: int = 3, dtype: torch.dtype = torch.float32) -> View:
    layers = architecture(cut)
    return view_of(layers.bottom(1000), images(targets), layers, dtype)


def first_clone(layers: Architecture, target: int) -> nn.Sequential:
    return layers.bottom(derive(derive(SEED, "restart/0"), f"clone/{target}"))
