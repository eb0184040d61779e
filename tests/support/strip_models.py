"""Networks for vertical split learning: of any image width, in double precision or with state."""

from math import prod

import torch
from torch import Tensor, nn

from leakbed.models.networks import FlattenLinear
from tests.support.double_models import Cast


class Columns(nn.Module):
    """Weighs every pixel and adds up each column; no column sees another."""

    def __init__(self, image_shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, *image_shape))
        self.bias = nn.Parameter(torch.randn(features, 1, image_shape[2]))

    def forward(self, images: Tensor) -> Tensor:
        columns = torch.einsum("bchw,ochw->bow", images, self.weight)
        return columns.unsqueeze(2) + self.bias


def summed(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Cut after layer 1, the smashed data of strips add up to those of the image."""
    return nn.Sequential(
        Cast(),
        FlattenLinear(prod(image_shape), 6),
        nn.Tanh(),
        nn.Linear(6, num_classes),
    ).double()


def joined(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Cut after layer 1 or 2, the smashed data of strips lie beside each other."""
    return nn.Sequential(
        Cast(),
        Columns(image_shape, 4),
        nn.Tanh(),
        FlattenLinear(4 * image_shape[2], num_classes),
    ).double()


def stateful(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """BatchNorm and dropout in the bottom, BatchNorm in the top; cut 3."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(3 * height * width, num_classes),
    )
