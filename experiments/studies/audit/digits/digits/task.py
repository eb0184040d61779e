"""The network and the data of the app."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import Normalize

normalize = Normalize((0.3,), (0.4,))


class Net(nn.Module):
    """A small convolutional network that runs one pooling layer twice."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.fc2 = nn.Linear(32, 10)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.AvgPool2d(2, 2)
        self.fc1 = nn.Linear(64, 32)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of ten digits."""
        maps = self.pool(torch.sigmoid(self.conv1(images)))
        maps = self.pool(torch.sigmoid(self.conv2(maps)))
        scores: Tensor = self.fc2(torch.sigmoid(self.fc1(maps.view(-1, 64))))
        return scores


def load_data(
    partition: int, partitions: int, *, batch_size: int, rows: int
) -> DataLoader[tuple[Tensor, ...]]:
    """Return the normalised digits of one node."""
    digits = load_digits()
    mine = slice(partition, None, partitions)
    images = torch.tensor(digits.images[mine][:rows], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target[mine][:rows])
    return DataLoader(TensorDataset(normalize(images), labels), batch_size=batch_size)


def train(
    net: nn.Module, loader: DataLoader[tuple[Tensor, ...]], *, epochs: int, lr: float
) -> float:
    """Train and return the mean loss of a batch."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader) / epochs


def test(net: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return the mean loss of a batch."""
    net.eval()
    with torch.no_grad():
        losses = [functional.cross_entropy(net(images), labels) for images, labels in loader]
    return float(torch.stack(losses).mean())
