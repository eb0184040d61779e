"""Samples of two labels, one of them rare, and the gradients at the cut of a network on them."""

import torch
from torch import Tensor, nn

from leakbed.contracts import Seat, View
from leakbed.models import Architecture

SAMPLES, RARE = 240, 24
LAYERS = Architecture(name="tabular-mlp", image_shape=(1, 3, 10), num_classes=2, cut=3)


def rare_run(stream: int, *, steps: int = 30) -> tuple[View, Tensor]:
    """Return what a node receives after so many steps of training, and the labels behind it."""
    drawn = torch.Generator().manual_seed(stream)
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    labels[torch.randperm(SAMPLES, generator=drawn)[:RARE]] = 1
    middle = torch.rand(2, 1, 3, 10, generator=drawn)
    images = middle[labels] + 0.3 * torch.randn(SAMPLES, 1, 3, 10, generator=drawn)
    bottom, top = (part(stream) for part in (LAYERS.bottom, LAYERS.top))
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
        num_classes=2,
        targets=SAMPLES,
        smashed=smashed.detach(),
        cut_gradient=gradients,
        architecture=LAYERS,
        known_labels=first_known(labels, 1),
    )
    return view, labels


def first_known(labels: Tensor, count: int) -> Tensor:
    """Return the labels of the first so many samples of each class, -1 elsewhere."""
    known = torch.full_like(labels, -1)
    for label in labels.unique():
        known[(labels == label).nonzero()[:count]] = label
    return known.unsqueeze(1)
