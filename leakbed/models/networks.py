"""The catalogue of networks: each a plain sequence whose layer indices are where it may be cut.

A layer's index counts activations and pools as the attacks' authors do; flattening belongs to the
fully connected layer that needs it, so it shifts no index.

Sources: ``lenet-sigmoid`` and ``mlp2``: Zhao, Luo, Ding, *Deep Leakage from Model in Federated
Learning*, CPAL 2024, https://arxiv.org/abs/2206.04887 (the former after Zhu, Liu, Han, *Deep
Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935). ``mnistnet`` and
``cifarnet``: Erdogan, Kupcu, Cicek, *UnSplit*, WPES 2022, https://arxiv.org/abs/2108.09033, the
networks of He, Zhang, Lee, *Model Inversion Attacks Against Collaborative Inference*, ACSAC 2019.
``fsha-resnet``: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger*, CCS 2021,
https://arxiv.org/abs/2012.02670, and its code, https://github.com/pasquini-dario/SplitNN_FSHA.
``two-blocks`` is our own, small enough to be hijacked on a CPU.

Departures:
- Other image sizes, channel counts and class counts are accepted; only the first and the fully
  connected layers change.
- Activations never work in place: a tap on the layer before would see the value after.
- The activation is a setting, since gradient matching needs a second derivative that ReLU lacks.
- ``fsha-resnet`` is published up to its deepest cut; the block and linear layer after it are ours.
- Its strided convolutions pad all sides, where TensorFlow pads an even image right and below only.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from leakbed.models.residual import ResidualBlock, glorot

Activation = Callable[[], nn.Module]

ACTIVATIONS: dict[str, Activation] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky-relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class ImageTooSmallError(ValueError):
    """The image is too small for a network's convolutions and pools."""


class FlattenLinear(nn.Linear):
    """A fully connected layer that flattens its input, so flattening has no index of its own."""

    def forward(self, input: Float[Tensor, " batch *cut"]) -> Float[Tensor, " batch features"]:  # noqa: A002  nn.Linear's name
        """Apply the layer to the flattened input."""
        return super().forward(input.flatten(1))


DETERMINISTIC: frozenset[type[nn.Module]] = frozenset(
    {
        FlattenLinear,
        nn.AvgPool2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.ELU,
        nn.Flatten,
        nn.GELU,
        nn.Identity,
        nn.LeakyReLU,
        nn.Linear,
        nn.MaxPool2d,
        nn.ReLU,
        nn.Sequential,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
        ResidualBlock,
    }
)
"""Layers whose forward pass draws no random number; subclasses are not meant."""


def _sides(
    image_shape: tuple[int, int, int], *, shrink: Callable[[int], int], least: int
) -> tuple[int, int]:
    """Return the last feature map's height and width, or refuse the image."""
    _, height, width = image_shape
    if min(height, width) < least:
        raise ImageTooSmallError(
            f"images are {height}x{width}, but the network needs at least {least}x{least}"
        )
    return shrink(height), shrink(width)


def lenet_sigmoid(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return the LeNet of DLG and DLM: three strided convolutions of 12 channels, one linear layer.

    Args:
        image_shape: Channels, height, width.
        num_classes: Size of the output.
        activation: Replaces the published Sigmoid.

    Returns:
        Layers 0 to 6; 1, 3 and 5 are the activations.
    """
    act = activation or nn.Sigmoid
    sides = _sides(image_shape, shrink=lambda side: ((side + 1) // 2 + 1) // 2, least=1)
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 12, 5, stride=2, padding=2),
        act(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        act(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        act(),
        FlattenLinear(12 * prod(sides), num_classes),
    )


def mlp2(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return DLM's perceptron: 32 hidden units between the pixels and the classes.

    Args:
        image_shape: Channels, height, width.
        num_classes: Size of the output.
        activation: Replaces the published ReLU.

    Returns:
        Layers 0 to 2.
    """
    act = activation or nn.ReLU
    return nn.Sequential(
        FlattenLinear(prod(image_shape), 32),
        act(),
        nn.Linear(32, num_classes),
    )


def mnistnet(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return UnSplit's digit network: two convolutions with pools, then three linear layers.

    Args:
        image_shape: Channels, height, width; a side under 16 pixels is refused.
        num_classes: Size of the output.
        activation: Replaces the published ReLU everywhere.

    Returns:
        Layers 0 to 10; the pools are 2 and 5.
    """
    act = activation or nn.ReLU
    sides = _sides(image_shape, shrink=lambda side: ((side - 4) // 2 - 4) // 2, least=16)
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 8, 5),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5),
        act(),
        nn.MaxPool2d(2),
        FlattenLinear(16 * prod(sides), 120),
        act(),
        nn.Linear(120, 84),
        act(),
        nn.Linear(84, num_classes),
    )


def cifarnet(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return UnSplit's network for coloured images: six convolutions, then two linear layers.

    Args:
        image_shape: Channels, height, width; a side under 8 pixels is refused.
        num_classes: Size of the output.
        activation: Replaces the published ReLU, and the Sigmoid before the last layer.

    Returns:
        Layers 0 to 17; the pools are 4, 9 and 14.
    """
    act = activation or nn.ReLU
    sides = _sides(image_shape, shrink=lambda side: side // 8, least=8)
    layers: list[nn.Module] = []
    channels = image_shape[0]
    for width in (64, 128, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), act()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers,
        FlattenLinear(channels * prod(sides), 512),
        (activation or nn.Sigmoid)(),
        nn.Linear(512, num_classes),
    )


def fsha_resnet(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return the residual network of feature-space hijacking; its splits 1 to 4 are cuts 4 to 7.

    Args:
        image_shape: Channels, height, width; the paper's is 3 x 32 x 32.
        num_classes: Size of the output.
        activation: Replaces the published ReLU everywhere.

    Returns:
        Layers 0 to 10: convolution, BatchNorm, ReLU, pool, four blocks, and ours.
    """
    act = activation or nn.ReLU
    sides = _sides(image_shape, shrink=lambda side: ((side // 2 + 1) // 2 + 1) // 2, least=2)
    layers = nn.Sequential(
        nn.Conv2d(image_shape[0], 64, 3, padding=1),
        nn.BatchNorm2d(64, eps=1e-3, momentum=0.01),  # Keras's defaults
        act(),
        nn.MaxPool2d(2),
        ResidualBlock(64, 64, activation=act),
        ResidualBlock(64, 128, stride=2, activation=act),
        ResidualBlock(128, 128, activation=act),
        ResidualBlock(128, 256, stride=2, activation=act),
        ResidualBlock(256, 256, activation=act),
        act(),
        FlattenLinear(256 * prod(sides), num_classes),
    )
    glorot(layers)
    return layers


def two_blocks(
    image_shape: tuple[int, int, int], num_classes: int, *, activation: Activation | None = None
) -> nn.Sequential:
    """Return two blocks of convolution, BatchNorm, activation and pool, then one linear layer.

    Args:
        image_shape: Channels, height, width; a side under 4 pixels is refused.
        num_classes: Size of the output.
        activation: Replaces ReLU.

    Returns:
        Layers 0 to 8; the pools are 3 and 7.
    """
    act = activation or nn.ReLU
    sides = _sides(image_shape, shrink=lambda side: side // 4, least=4)
    layers: list[nn.Module] = []
    for inputs, outputs in ((image_shape[0], 32), (32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), act(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, FlattenLinear(64 * prod(sides), num_classes))


class Network(NamedTuple):
    """A catalogue entry: how to build a network, and what it is in a few words."""

    build: Callable[..., nn.Sequential]
    words: str


MODELS: Mapping[str, Network] = {
    "cifarnet": Network(cifarnet, "UnSplit's network for coloured images, 18 layers"),
    "fsha-resnet": Network(fsha_resnet, "feature-space hijacking's residual network, 11 layers"),
    "lenet-sigmoid": Network(lenet_sigmoid, "the LeNet of DLG and DLM, 7 layers"),
    "mlp2": Network(mlp2, "DLM's perceptron with 32 hidden units, 3 layers"),
    "mnistnet": Network(mnistnet, "UnSplit's digit network, 11 layers"),
    "two-blocks": Network(two_blocks, "two convolutions with BatchNorm and pools, 9 layers"),
}
