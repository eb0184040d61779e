"""The smallest network of the split benchmarks: 784 pixels, 256 hidden units, 10 classes; cut 1."""

from torch import nn


def network() -> nn.Sequential:
    """Return flattening, a hidden layer with its activation, and the output layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
