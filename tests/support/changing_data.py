"""Data that are others in every process, as functions without a seed make them."""

import numpy as np
import torch
from torch import Tensor

from tests.support import tiny


def shuffled() -> tuple[Tensor, Tensor]:
    """The same rows in an order drawn without a seed."""
    images, labels = tiny.images()
    order = torch.from_numpy(np.random.default_rng().permutation(len(images)))
    return images[order], labels[order]


def numbered_by_a_set() -> tuple[Tensor, Tensor, list[str]]:
    """Classes and rows in the order of a set of names, which differs from process to process.

    Three classes alone have the same order in one of six processes.
    """
    images, labels = tiny.images()
    names = [f"class {label}" for label in range(100)]
    present = set(names[:3])
    order = {name: place for place, name in enumerate(n for n in set(names) if n in present)}
    numbers = torch.tensor([order[names[label]] for label in labels.tolist()])
    rows = torch.tensor([row for row in map(names.index, set(names)) if row < len(images)])
    return images[rows], numbers[rows], list(order)
