"""Tables as pictures one pixel high or wide, and a network that reads images of any shape."""

import torch
from torch import Tensor, nn


def _rows(*shape: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(60, *shape, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(60) % 2


def low() -> tuple[Tensor, Tensor]:
    """One pixel high."""
    return _rows(1, 1, 16)


def slim() -> tuple[Tensor, Tensor]:
    """One pixel wide."""
    return _rows(1, 16, 1)


def square() -> tuple[Tensor, Tensor]:
    """Four columns, of which each of four parties holds one."""
    return _rows(1, 4, 4)


def net(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Dense layers; cut 2 is after the first activation."""
    pixels = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 12), nn.Sigmoid(), nn.Linear(12, num_classes)
    )
