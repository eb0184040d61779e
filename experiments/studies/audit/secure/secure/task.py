"""The network and the data of the app."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Net(nn.Module):
    """A small network of dense layers."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of ten digits."""
        scores: Tensor = self.fc2(torch.sigmoid(self.fc1(images.flatten(1))))
        return scores


def load_data(partition: int) -> tuple[Tensor, Tensor]:
    """Return the digit of one node."""
    digits = load_digits()
    images = torch.tensor(digits.images[partition : partition + 1], dtype=torch.float32)
    return images.unsqueeze(1) / 16, torch.tensor(digits.target[partition : partition + 1])


def train(net: nn.Module, images: Tensor, labels: Tensor, *, lr: float) -> float:
    """Train for one step and return the loss before it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    optimizer.zero_grad()
    loss = nn.CrossEntropyLoss()(net(images), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def get_weights(net: nn.Module) -> list[NDArray[np.float32]]:
    """Return the weights as a list, in the network's order."""
    return [value.numpy() for value in net.state_dict().values()]


def set_weights(net: nn.Module, weights: list[NDArray[np.float32]]) -> None:
    """Load weights that :func:`get_weights` returned."""
    named = zip(net.state_dict(), weights, strict=True)
    net.load_state_dict({name: torch.tensor(value) for name, value in named})
