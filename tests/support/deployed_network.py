"""A network for a deployment: its processes find it by import path, as they would a user's own."""

from torch import nn


def network() -> nn.Sequential:
    """BatchNorm and dropout in the bottom, BatchNorm in the top; cut 3; digits of 28x28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 7, stride=3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(108, 10),
    )
