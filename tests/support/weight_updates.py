"""Small FedAvg victims for the tests of the weight-update attacks, and how to score guesses."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from leakbed.contracts import Guess, Seat, View
from leakbed.models import Architecture
from leakbed.seeds import generator

SMALL = (1, 12, 12)


@dataclass(frozen=True, kw_only=True, eq=False)
class Victims:
    """What an attack sees, and what it must not see."""

    view: View
    images: Tensor
    labels: Tensor

    def errors(self, guess: Guess) -> Tensor:
        """Return the mean squared error of every single-image target, after clipping."""
        assert guess.images is not None
        return (guess.images.clamp(0, 1) - self.images).square().flatten(1).mean(1)


def smooth_images(count: int, shape: tuple[int, int, int] = SMALL, *, stream: int = 5) -> Tensor:
    """Return random images with smooth strokes, as digits have."""
    coarse = torch.rand(count, shape[0], 4, 4, generator=generator(stream))
    return interpolate(coarse, size=shape[1:], mode="bilinear").clamp(0, 1)


def train(
    images: Tensor,
    labels: Tensor,
    *,
    architecture: Architecture,
    learning_rate: float = 0.01,
    local_steps: int = 1,
    stream: int = 100,
) -> Victims:
    """Return the victims of plain SGD; each has initial weights of its own, in float32."""
    targets, rows = labels.shape
    before, after, buffers = [], [], {}
    for target in range(targets):
        model = architecture.build(stream + target)
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
        before.append(_weights(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        for step in torch.arange(rows).chunk(local_steps):
            optimizer.zero_grad()
            cross_entropy(model(images[target, step]), labels[target, step]).backward()
            optimizer.step()
        after.append(_weights(model))
    view = View(
        seat=Seat.SERVER,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=targets,
        rows=rows,
        local_steps=local_steps,
        before={name: torch.stack([each[name] for each in before]) for name in before[0]},
        after={name: torch.stack([each[name] for each in after]) for name in after[0]},
        buffers=buffers,
        architecture=architecture,
        device=torch.device("cpu"),
    )
    return Victims(view=view, images=images, labels=labels)


def small_victims(
    targets: int = 3,
    *,
    rows: int = 1,
    local_steps: int = 1,
    learning_rate: float = 0.01,
    model: str = "lenet-sigmoid",
    initialisation: str = "uniform",
) -> Victims:
    """Return victims on which an attack takes a second."""
    architecture = Architecture(
        name=model, image_shape=SMALL, num_classes=4, initialisation=initialisation
    )
    images = smooth_images(targets * rows).unflatten(0, (targets, rows))
    labels = (torch.arange(targets * rows) % 4).view(targets, rows)
    return train(
        images,
        labels,
        architecture=architecture,
        local_steps=local_steps,
        learning_rate=learning_rate,
    )


def digit_victims(
    targets: int = 32,
    *,
    learning_rate: float,
    model: str = "lenet-sigmoid",
    activation: str | None = None,
    initialisation: str = "uniform",
) -> Victims:
    """Return victims on MNIST's test images, or skip where the files are missing."""
    root = os.environ.get("LEAKBED_DATA")
    folder = Path(root or "") / "MNIST" / "raw"
    if root is None or not folder.is_dir():
        pytest.skip("LEAKBED_DATA holds no MNIST/raw")
    pixels = np.fromfile(folder / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)
    classes = np.fromfile(folder / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    drawn = torch.randperm(len(classes), generator=generator(2206))[:targets]
    architecture = Architecture(
        name=model,
        image_shape=(1, 28, 28),
        num_classes=10,
        activation=activation,
        initialisation=initialisation,
    )
    return train(
        torch.from_numpy(pixels)[drawn].unsqueeze(1) / 255,
        torch.from_numpy(classes).long()[drawn].unsqueeze(1),
        architecture=architecture,
        learning_rate=learning_rate,
        stream=4887,
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
