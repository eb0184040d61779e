"""Networks in float64, where sums in another order agree to 1e-10; reached by import path.

Each reads 6x6 images, casts them first, and may be cut after any layer from 1 to 7.
"""

import torch
from torch import Tensor, nn

from leakbed.models import Architecture
from tests.support import tiny

CUTS = range(1, 8)


class Cast(nn.Module):
    """Float images into float64."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double()


class Clipping(nn.Module):
    """ReLU, then rows of at most a length: what ``smashed-noise`` with clip does, as a layer."""

    def forward(self, rows: Tensor) -> Tensor:
        kept = rows.relu()
        norms = kept.flatten(1).norm(dim=1).clamp_min(1e-12)
        shrink = (CLIP / norms).clamp_max(1.0)
        return kept * shrink.reshape(-1, 1, 1, 1)


CLIP = 0.5  # of rows of about that length: some are clipped, others are not


def double() -> nn.Sequential:
    """Layers without buffers or randomness."""
    return _layers(nn.ReLU(), nn.Tanh())


def double_clipping() -> nn.Sequential:
    """The same with a clip after the fourth layer; weights have the same names."""
    layers = double()
    layers[4] = Clipping()
    return layers


def double_normed() -> nn.Sequential:
    """BatchNorm in the lower half and in the upper."""
    return _layers(nn.BatchNorm2d(4), nn.BatchNorm1d(5))


def double_averaging() -> nn.Sequential:
    """BatchNorm whose statistics are plain averages over the batches it counted."""
    return _layers(nn.BatchNorm2d(4, momentum=None), nn.Tanh())


def _layers(lower: nn.Module, upper: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        Cast(),
        nn.Conv2d(1, 4, 3),
        lower,
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        upper,
        nn.Linear(5, 3),
    ).to(torch.float64)


def architecture(
    name: str = "double", *, cut: int = 3, upper_cut: int | None = None
) -> Architecture:
    return Architecture(
        name=f"tests.support.double_models:{name}",
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=tiny.CLASSES,
        cut=cut,
        upper_cut=upper_cut,
    )
