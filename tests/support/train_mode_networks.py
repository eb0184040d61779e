"""Networks that compute something else in training than in evaluation; imported by path."""

from torch import nn


def _convolutional(*between: nn.Module) -> nn.Sequential:
    """Return a network for images of 1 x 12 x 12 in 4 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        *between,
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 4),
    )


def normalised() -> nn.Sequential:
    return _convolutional(nn.BatchNorm2d(8))


def normalised_features() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 4)
    )


def dropping() -> nn.Sequential:
    return _convolutional(nn.Dropout(0.2))


def idle() -> nn.Sequential:
    """Return a network with layers whose training is no different."""
    return _convolutional(nn.GroupNorm(2, 8), nn.Dropout(0.0), nn.ReLU(inplace=True))


def with_statistics_of_its_own() -> nn.Sequential:
    return _convolutional(nn.InstanceNorm2d(8, track_running_stats=True))
