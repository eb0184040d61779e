"""Views whose messages carry planted structure: a direction for each label, and noise."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from leakbed.contracts import Seat, View

CLASSES = 5


def planted(count: int = 200, *, width: int = 24, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return rows that point where their label says, of any length, and the labels."""
    stream = torch.Generator().manual_seed(11)
    labels = torch.randint(CLASSES, (count,), generator=stream)
    labels[:CLASSES] = torch.arange(CLASSES)
    directions = normalize(torch.randn(CLASSES, width, generator=stream), dim=1)
    rows = directions[labels] + noise * torch.randn(count, width, generator=stream) / width**0.5
    lengths = 10 ** (4 * torch.rand(count, 1, generator=stream) - 3)
    return rows * lengths, labels


def known(labels: Tensor, *, first: int = CLASSES) -> Tensor:
    """Return the labels of the first rows, -1 elsewhere."""
    return torch.where(torch.arange(len(labels)) < first, labels, -1)[:, None]


def view_of(rows: Tensor, known_labels: Tensor | None, /, **changes: Any) -> View:
    """Return the view of a feature party with these cut gradients."""
    granted = {"cut_gradient": rows, "known_labels": known_labels, "seat": Seat.CLIENT} | changes
    return View(
        image_shape=(1, 4, 4),
        num_classes=changes.get("num_classes", CLASSES),
        targets=len(rows),
        device=torch.device("cpu"),
        **{name: value for name, value in granted.items() if name != "num_classes"},
    )


def accuracy(guessed: Tensor | None, labels: Tensor, *, known_rows: int = CLASSES) -> float:
    """Return the share of right labels among the rows that are not known."""
    assert guessed is not None
    return float((guessed.flatten() == labels)[known_rows:].double().mean())


def within_chance(guessed: Tensor | None, labels: Tensor, *, known_rows: int = CLASSES) -> bool:
    """Say whether guesses are right no oftener than chance, up to two standard errors."""
    chance = float(torch.bincount(labels[known_rows:]).max()) / (len(labels) - known_rows)
    error = (chance * (1 - chance) / (len(labels) - known_rows)) ** 0.5
    return accuracy(guessed, labels, known_rows=known_rows) <= chance + 2 * error
