"""Networks as a user would bring them, legal and not; imported by path in the tests."""

from torch import Tensor, nn


class Sequence(nn.Sequential):
    def __init__(self, *, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(1)
        )
        side = (image_shape[1] - 2) * (image_shape[2] - 2)
        self[3] = nn.Linear(2 * side, num_classes)


class Staged(nn.Module):
    stages = ("flatten", "hidden", "act", "output")

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.output = nn.Linear(5, 10)
        self.hidden = nn.Linear(16, 5)
        self.act = activation()
        self.flatten = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.act(self.hidden(self.flatten(images))))


class Secretive(Staged):
    """Does something between its stages."""

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.act(2 * self.hidden(self.flatten(images))))


class Hoarder(Staged):
    """Keeps a parameter outside its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)


class Mistaken(Staged):
    stages = ("flatten", "hiden")


class Stageless(nn.Module):
    pass


class Demanding(nn.Sequential):
    def __init__(self, depth: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, depth))


def broken() -> nn.Module:
    raise RuntimeError("out of ideas")


def no_module() -> str:
    return "not a network"


Builtin = dict

NOT_CALLABLE = 3


class Lazy(nn.Sequential):
    """Its first layer learns its size from the first input."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
