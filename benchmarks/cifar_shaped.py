"""The data and the network of the FedAvg benchmark; needs torch alone, as pfl's side has no more.

Source: the network is ``simple_cnn`` of Granqvist et al., *pfl-research: simulation framework for
accelerating research in Private Federated Learning*, NeurIPS 2024,
https://arxiv.org/abs/2404.06430, benchmarks/model/pytorch/cnn.py.

Departures: pooling after each convolution and not after the second alone: 315,722 parameters
instead of 1,626,442, which is the size this benchmark is usually quoted with. Noise for images: no
time depends on what is in them.
"""

import torch
from torch import Tensor, nn

IMAGE_SHAPE, CLASSES, ROWS = (3, 32, 32), 10, 50_000


def images() -> tuple[Tensor, Tensor]:
    """Return noise in the shape of CIFAR-10's training part, and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(ROWS, *IMAGE_SHAPE, generator=generator), torch.arange(ROWS) % CLASSES


def network() -> nn.Sequential:
    """Return two convolutions and a dense hidden layer."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 6 * 6, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, CLASSES),
    )
