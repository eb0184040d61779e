"""Networks that say in code what lies between their layers, as most do; imported by path."""

import torch
from torch import Tensor, nn
from torch.nn import functional

PIXELS, CLASSES = 144, 4


class Whole(nn.Module):
    """Made in another order than it runs, with what lies between its layers in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, CLASSES)
        self.first = nn.Linear(PIXELS, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(images.view(-1, PIXELS))))


class Reusing(nn.Module):
    """Runs one pooling layer and one hidden layer twice, and returns log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.pool = nn.AvgPool2d(2, 1)
        self.output = nn.Linear(8, CLASSES)
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(128, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.pool(torch.sigmoid(self.conv(images))))
        hidden = torch.sigmoid(self.outer(torch.flatten(maps, 1)))
        for _ in range(2):
            hidden = torch.sigmoid(self.inner(hidden))
        return functional.log_softmax(self.output(hidden), dim=1)


class Tied(Whole):
    """Two of its layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(images.view(-1, PIXELS)))
        return self.second(torch.sigmoid(self.two(torch.sigmoid(self.one(hidden)))))


class Dropping(Whole):
    """Drops by a function, which no layer shows."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(images.view(-1, PIXELS)))
        return self.second(functional.dropout(hidden, training=self.training))


class Skipping(Whole):
    """Its scores are not what its last layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(PIXELS, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.beside(images.view(-1, PIXELS))
