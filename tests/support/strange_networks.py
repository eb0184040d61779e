"""Networks as people bring them, each with one habit that published ones have; imported by path."""

import torch
from torch import Tensor, nn

SIDE = 6  # of the images of tests.support.tiny


class To(nn.Module):
    """Casts to a type, as mixed precision written by hand does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)


class Lowers(nn.Module):
    """Rectifies what lies above a level; in place it writes to its input, and no flag says so."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self._writes = inplace

    def forward(self, rows: Tensor) -> Tensor:
        return rows.sub_(0.1).relu_() if self._writes else rows.sub(0.1).relu()


class Adds(nn.Module):
    """Adds what it was given, which its first layer has written over by then."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 1, 3, padding=1))

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.inner(rows)
        return out + rows


def adding() -> nn.Sequential:
    """The first layer above cut 0 is a block that writes to its input."""
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Adds(), nn.Flatten(), nn.Linear(SIDE**2, 3))


def overwriting() -> nn.Sequential:
    """Its first layer writes to the images."""
    return nn.Sequential(
        nn.Sequential(Lowers(inplace=True), nn.Conv2d(1, 2, 3)), nn.Flatten(), nn.Linear(32, 3)
    )


def _activated_twice(one: nn.Module, two: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), one, nn.Conv2d(4, 3, 3), two, nn.Flatten(), nn.Linear(12, 3))
    )


def rectified_in_place() -> nn.Sequential:
    """The first layers above cuts 0 and 2 rectify in place."""
    return _activated_twice(nn.LeakyReLU(0.2, inplace=True), nn.ReLU(inplace=True))


def rectified_apart() -> nn.Sequential:
    """The same, each layer with an output of its own."""
    return _activated_twice(nn.LeakyReLU(0.2), nn.ReLU())


def written_in_place() -> nn.Sequential:
    """The same habit in layers of one's own."""
    return _activated_twice(Lowers(inplace=True), Lowers(inplace=True))


def written_apart() -> nn.Sequential:
    """Those layers, each with an output of its own."""
    return _activated_twice(Lowers(inplace=False), Lowers(inplace=False))


def one_activation() -> nn.Sequential:
    """One activation object at three places; cut 3."""
    return _activated(*[nn.Tanh()] * 3)


def three_activations() -> nn.Sequential:
    """The same with an activation object for each place; cut 3."""
    return _activated(*(nn.Tanh() for _ in range(3)))


def _activated(one: nn.Module, two: nn.Module, three: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3), one, nn.Conv2d(2, 2, 3, padding=1), two),
        *(nn.Flatten(), nn.Linear(32, 8), three, nn.Linear(8, 3)),
    )


def tied() -> nn.Sequential:
    """Two layers of the bottom share one weight; cut 6."""
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(SIDE**2, 8), nn.Tanh(), one, nn.Tanh(), two, nn.Tanh()),
        nn.Linear(8, 3),
    )


def repeated() -> nn.Sequential:
    """One linear layer at two places of the bottom; cut 6."""
    one = nn.Linear(8, 8)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(SIDE**2, 8), nn.Tanh(), one, nn.Tanh(), one, nn.Tanh()),
        nn.Linear(8, 3),
    )


def normalised_twice() -> nn.Sequential:
    """One BatchNorm without weights of its own at layers 1 and 3."""
    norm = nn.BatchNorm2d(2, affine=False)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.Conv2d(2, 2, 3), norm, nn.Flatten(), nn.Linear(8, 3)
    )


def converted(dtype: torch.dtype) -> nn.Sequential:
    """Computes in another type from end to end."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def bfloat16() -> nn.Sequential:
    return nn.Sequential(To(torch.bfloat16), *converted(torch.bfloat16), To(torch.float32))


def half() -> nn.Sequential:
    return nn.Sequential(To(torch.float16), *converted(torch.float16), To(torch.float32))


def bare_half() -> nn.Sequential:
    return converted(torch.float16)


def double() -> nn.Sequential:
    return nn.Sequential(To(torch.float64), *converted(torch.float64), To(torch.float32))


def bare_double() -> nn.Sequential:
    return converted(torch.float64)


class Turned(nn.Linear):
    """Multiplies with a complex number, and keeps what is real."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return (super().forward(input) * self.phase).real


def complex_() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), Turned(SIDE**2), nn.Linear(SIDE**2, 3))


def half_at_the_cut() -> nn.Sequential:
    """Weights in single precision; what crosses cut 2 is in half."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(SIDE**2, 4), To(torch.float16), To(torch.float32)),
        nn.Linear(4, 3),
    )


class Staged(nn.Module):
    """A module that names its stages; each of its kind does something odd in ``forward``."""

    stages = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 4))
        self.two = nn.Linear(4, 3)


class TwoInputs(Staged):
    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(image) + age)
        return out


class Raises(Staged):
    def forward(self, image: Tensor) -> Tensor:
        raise KeyError("mask")


class Pair(Staged):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.one(image)
        return self.two(inner), inner


class Auxiliary(nn.Module):
    """A last layer that gives two outputs in training and one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        main: Tensor = self.main(rows)
        return (main, self.other(rows)) if self.training else main


def auxiliary() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 8), Auxiliary())


class Unnamed(nn.Module):
    """Returns a dictionary, as many a published model does."""

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"logits": rows}


def dictionary() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 3), Unnamed())


class OneRow(nn.Module):
    """Reads one row at a time."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(1, SIDE**2)


def one_row() -> nn.Sequential:
    return nn.Sequential(OneRow(), nn.Linear(SIDE**2, 8), nn.Linear(8, 3))


class Squeezes(nn.Module):
    """Drops the axis of a batch of one with the others of length one."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.flatten(1)[:, :, None].squeeze()


def squeezing() -> nn.Sequential:
    """Right in evaluation of many rows and wrong on a batch of one."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), Squeezes(), Restored(), nn.Linear(32, 3))


class Restored(nn.Module):
    """Gives a row that lost its batch its axis back, in evaluation only."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows if self.training else rows.reshape(-1, 32)


def normalised_features() -> nn.Sequential:
    """BatchNorm over features at layer 4, which cannot train on a batch of one row."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 8)),
        *(nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    )


def frozen_bottom() -> nn.Sequential:
    """A feature extractor that is not trained, at layer 0."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    net[0].requires_grad_(False)
    return net


def frozen_top() -> nn.Sequential:
    net = frozen_bottom().requires_grad_(True)
    net[3].requires_grad_(False)
    return net


def frozen_head() -> nn.Sequential:
    """A frozen last layer above as many hidden units as there are classes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 3), nn.Tanh(), nn.Linear(3, 3))
    net[3].requires_grad_(False)
    return net


def frozen() -> nn.Sequential:
    return frozen_bottom().requires_grad_(False)


class Detached(nn.Conv2d):
    """Keeps its gradient to itself."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return super().forward(input).detach()


def detached_bottom() -> nn.Sequential:
    """Weights that could be trained, and no way for a gradient to reach them."""
    return nn.Sequential(Detached(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def half_frozen(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """The LeNet of DLG with its first layer frozen."""
    channels, height, width = image_shape
    size = 12 * -(-height // 4) * -(-width // 4)
    net = nn.Sequential(
        *(nn.Conv2d(channels, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(size, num_classes)),
    )
    net[0].requires_grad_(False)
    return net


def averaging_norm() -> nn.Sequential:
    """BatchNorm whose statistics are plain averages over all batches it counted; cut 1."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


class Single(nn.Module):
    """Casts to single precision, whatever it is given."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.float()


def single() -> nn.Sequential:
    return nn.Sequential(Single(), nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


class Branches(nn.Module):
    """Looks at its values to decide what to do."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows / 2 if rows.abs().max().item() > 100 else rows


def branching() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), Branches(), nn.Flatten(), nn.Linear(32, 3))


class Nested(nn.Module):
    """As torchvision's networks: a sequence, code, another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True))
        )
        self.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.classifier(torch.flatten(self.features(images), 1)))
        return out


def unnested() -> nn.Sequential:
    """The same layers, drawn in the same order, as one sequence."""
    own = Nested()
    return nn.Sequential(*own.features, nn.Flatten(), *own.classifier, own.head)
