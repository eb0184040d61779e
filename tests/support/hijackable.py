"""A network whose feature maps a pilot can make, and what its hijacker knows; by import path."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attacks.building_blocks.hijacking import EPSILON
from clients.node import NodeConfig
from leakbed.contracts import Seat, View
from leakbed.models import Architecture
from tests.support import tiny

CUT, SMASHED = 4, (4, 3, 3)


def network() -> nn.Sequential:
    """BatchNorm and dropout below the cut, at 4."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def architecture() -> Architecture:
    return Architecture(
        name="tests.support.hijackable:network",
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=tiny.CLASSES,
        cut=CUT,
    )


def cell(**settings: Any) -> NodeConfig:
    return tiny.cell(architecture=architecture(), **settings)


def view(**changes: Any) -> View:
    """What a hijacker of this network knows before training."""
    recipe = tiny.recipe()
    public = recipe.split().public
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": tiny.IMAGE_SHAPE,
        "num_classes": tiny.CLASSES,
        "targets": 0,
        "rows": 8,
        "public_images": recipe.dataset().images[public],
        "public_labels": recipe.dataset().labels[public],
        "smashed_shape": SMASHED,
        "device": torch.device("cpu"),
    }
    return View(**known | changes)


def plain_adam(networks: Iterable[nn.Module], rate: float, **more: Any) -> torch.optim.Adam:
    """Adam without a fused step, over all weights of some networks."""
    weights = [weight for network in networks for weight in network.parameters()]
    return torch.optim.Adam(weights, lr=rate, eps=EPSILON, foreach=False, fused=False, **more)


def published_critic(
    critic: nn.Module,
    sent: Tensor,
    maps: Tensor,
    *,
    mixing: torch.Generator,
    penalty_weight: float,
    axes: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Return the client's gradient and the critic's loss, term by term as published."""
    private = sent.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(private).mean(), private)
    share = torch.rand(len(sent), 1, 1, 1, generator=mixing)
    between = (share * sent + (1 - share) * maps.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norm = slope.square().sum(axes).sqrt()
    loss = critic(maps.detach()).mean() - critic(sent).mean()
    return gradient, loss + penalty_weight * (norm - 1).square().mean()


def blocks() -> nn.Sequential:
    """Cut at 2, and for a U-shape at 4 as well."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
