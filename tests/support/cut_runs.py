"""What crosses the cut of a small network in training, and the labels behind it."""

import torch
from torch import Tensor, nn

from leakbed.contracts import Seat, View
from leakbed.models import Architecture

SAMPLES, RARE = 240, 24


def rare_run(stream: int, *, steps: int = 30) -> tuple[View, Tensor]:
    """Return what a node sends and receives after some training on two labels, one of them rare."""
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    drawn = torch.Generator().manual_seed(stream)
    labels[torch.randperm(SAMPLES, generator=drawn)[:RARE]] = 1
    return _run(labels, stream, steps=steps)


def even_run(stream: int, *, steps: int = 30) -> tuple[View, Tensor]:
    """Return the same of four labels, all equally frequent."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(stream))
    return _run(order % 4, stream, steps=steps)


def _run(labels: Tensor, stream: int, *, steps: int) -> tuple[View, Tensor]:
    drawn = torch.Generator().manual_seed(stream + 1000)
    classes = int(labels.max()) + 1
    layers = Architecture(name="tabular-mlp", image_shape=(1, 3, 10), num_classes=classes, cut=3)
    middle = torch.rand(classes, 1, 3, 10, generator=drawn)
    images = middle[labels] + 0.3 * torch.randn(SAMPLES, 1, 3, 10, generator=drawn)
    bottom, top = layers.bottom(stream), layers.top(stream)
    adam = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=2e-3)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(top(bottom(images)), labels).backward()
        adam.step()
    smashed = bottom(images).detach().requires_grad_()
    loss = nn.functional.cross_entropy(top(smashed), labels)
    (gradients,) = torch.autograd.grad(loss, smashed)
    view = View(
        seat=Seat.CLIENT,
        image_shape=(1, 3, 10),
        num_classes=classes,
        targets=SAMPLES,
        smashed=smashed.detach(),
        cut_gradient=gradients,
        architecture=layers,
        known_labels=first_known(labels, 1),
    )
    return view, labels


def first_known(labels: Tensor, count: int) -> Tensor:
    """Return the labels of the first so many samples of each class, -1 elsewhere."""
    known = torch.full_like(labels, -1)
    for label in labels.unique():
        known[(labels == label).nonzero()[:count]] = label
    return known.unsqueeze(1)
