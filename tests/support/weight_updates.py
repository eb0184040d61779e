"""Small FedAvg victims for the tests of the weight-update attacks, and how to score guesses."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, log_softmax

from leakbed.contracts import Guess, Seat, View
from leakbed.models import Architecture
from leakbed.seeds import derive, generator

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


Gap = Callable[[list[Tensor], list[Tensor]], Tensor]


def literal_search(
    victims: Victims,
    target: int,
    gap: Gap,
    *,
    seed: int,
    iterations: int,
    beside: Sequence[Tensor] = (),
) -> Tensor:
    """Return a dummy image after some L-BFGS iterations at one victim, as the papers have it.

    ``gap`` is of the dummy's gradients and of how far the weights moved; ``beside`` are further
    unknowns of it.
    """
    view = victims.view
    assert view.before is not None
    assert view.after is not None
    assert view.architecture is not None
    model = view.architecture.build(0).double()
    model.load_state_dict({name: tensor[target].double() for name, tensor in view.before.items()})
    names = [name for name, _ in model.named_parameters()]
    moved = [view.before[n][target].double() - view.after[n][target].double() for n in names]
    stream = derive(derive(seed, f"target/{target}"), "try/0")
    start = torch.randn(148, generator=generator(stream), dtype=torch.float64)
    image = start[:144].view(1, 1, 12, 12).clone().requires_grad_()
    score = start[144:].view(1, 4).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([image, score, *beside], lr=1, max_iter=iterations + 1)
    seen: list[tuple[float, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(score.softmax(-1) * log_softmax(model(image), -1)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        value = gap(list(gradients), moved)
        value.backward()
        seen.append((value.item(), image.detach().clone()))
        return value

    optimizer.step(closure)
    return min(seen, key=lambda pair: pair[0])[1]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
