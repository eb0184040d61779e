"""Truths made of smooth random shapes: private images that resemble each other, as digits do."""

import pytest
import torch
from torch.nn.functional import interpolate

from leakbed.oracle import Truth


def shapes(count: int, *, seed: int) -> torch.Tensor:
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, size=(12, 12), mode="bilinear", align_corners=True)


def truth_of(*, targets: int, rows: int, private: int = 200) -> Truth:
    labels = torch.arange(private) % 10
    return Truth.among(
        shapes(private, seed=0),
        labels,
        rows=torch.arange(targets * rows).view(targets, rows) * 3 % private,
        num_classes=10,
        stream=1,
        public_images=shapes(300, seed=2),
        public_labels=torch.cat([torch.zeros(30), torch.arange(270) % 10]).long(),
        limit=100,
    )


@pytest.fixture
def truth() -> Truth:
    return truth_of(targets=16, rows=1)


@pytest.fixture
def batches() -> Truth:
    return truth_of(targets=6, rows=5)
