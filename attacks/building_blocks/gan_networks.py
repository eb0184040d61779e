"""Networks of the GAN attacks: pilot, decoder and critic of a hijack, and an image generator.

**Pilot, decoder, critic**, for feature maps of any shape. The pilot turns images into feature maps
of the client's shape, the decoder turns them back, the critic tells the client's maps from the
pilot's. An attacker knows the shapes of image and maps, so the stages between the two follow from
them: halvings that pad their input, or that do not.

Source: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on Split Learning*,
CCS 2021, https://arxiv.org/abs/2012.02670, and its code,
https://github.com/pasquini-dario/SplitNN_FSHA.

Departures:
- Feature maps the paper has no network for: its widths continue by the same rule, and unpadded
  stages (kernel 6) are ours. A padded pilot does not align with an unpadded client on 4x4 maps.
- Strided convolutions pad all sides; TensorFlow pads an even image on the right and below only.
- ``small`` networks are ours, for grey images on a CPU.
- The paper's own table has critics that cannot be built; theirs is the code's for either kind.

**The generator** makes images from noise, after DCGAN: a dense layer, then convolutions of which
every second doubles the size. It is built for any image whose sides have four pixels or more: each
doubling goes from exactly one size to the next, so 28 pixels grow from 7 and 32 from 8.

Source: the generator of Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on
Split Learning*, CCS 2021, https://arxiv.org/abs/2012.02670, client-side attack, as its code has it;
after Radford, Metz, Chintala, *Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks*, ICLR 2016, https://arxiv.org/abs/1511.06434.

Departures:
- BatchNorm comes after the dense layer's reshaping, by channel, and always reads the batch at hand.
- Images lie in [0, 1], which is where the published tanh is moved.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leakbed.models.networks import FlattenLinear, ResidualBlock, glorot
from leakbed.seeds import scoped

NETS = ("paper", "small")
ACTIVATIONS = ("linear", "swish")
PADDINGS = ("auto", "padded", "unpadded")

Sides = tuple[int, int]
Net = TypeVar("Net", bound=nn.Module)

_KERNEL = 6  # of an unpadded stage: a 5x5 convolution and a 2x2 pool read 6 pixels, 2 apart
_DARKEST = 0.95  # beyond it tanh is too flat to leave
_STAGES = 5  # 32 pixels are 1 after as many halvings


class NoPilotError(ValueError):
    """Feature maps of a shape that no pilot makes; the message says which ones pilots make."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything the three networks are built from.

    Attributes:
        image_channels: Of the images.
        channels: Of the feature maps.
        sides: Height and width of the image, and after each halving; the last are the maps'.
        padded: Whether the halvings pad.
        nets: ``"paper"`` or ``"small"``.
        activations: ``"linear"`` (the published code's) or ``"swish"`` (the paper's: swish in the
            pilot, ReLU in the decoder).
    """

    image_channels: int
    channels: int
    sides: tuple[Sides, ...]
    padded: bool
    nets: str
    activations: str

    def pilot(self, stream: int) -> nn.Sequential:
        """Return the pilot with fresh weights."""
        return _drawn(stream, lambda: nn.Sequential(*self._pilot()))

    def decoder(self, stream: int, *, grey: float = 0.0) -> nn.Sequential:
        """Return the decoder with fresh weights; it makes images in [-1, 1].

        Args:
            stream: Of its weights.
            grey: What the small one makes of nothing at first. At the images' own mean its first
                steps need not darken everything: that drives the pilot's maps so far from zero
                that channels of a client without BatchNorm die on the way there.

        Returns:
            The network.
        """
        network = _drawn(stream, lambda: nn.Sequential(*self._decoder(), nn.Tanh()))
        if self.nets == "small":
            start = torch.tensor(grey).clamp(-_DARKEST, _DARKEST).atanh()
            nn.init.constant_(network[-2].bias, float(start))  # type: ignore[arg-type]
        return network

    def critic(self, stream: int) -> nn.Sequential:
        """Return the critic with fresh weights; it gives each row of feature maps a score."""
        return _drawn(stream, lambda: nn.Sequential(*self._critic()))

    def _pilot(self) -> Iterator[nn.Module]:
        """Yield halvings, then, in the paper's and where there are few, one convolution more."""
        stages = len(self.sides) - 1
        small = self.nets == "small"
        widths = [32 if small else 64 * 2**stage for stage in range(max(stages, 1))]
        direct = small and stages > 1  # the last halving makes the maps itself
        inputs = self.image_channels
        for width in widths[:-1] if direct else widths:
            yield self._halving(inputs, width) if stages else _convolution(inputs, width)
            yield from self._activation(nn.SiLU())
            inputs = width
        yield (
            self._halving(inputs, self.channels) if direct else _convolution(inputs, self.channels)
        )
        if not small and stages == 1:  # split 1 of the paper's table
            yield from self._activation(nn.SiLU())

    def _decoder(self) -> Iterator[nn.Module]:
        """Yield doublings, then, but in the paper's deepest, one convolution more."""
        doublings = list(zip(self.sides[:0:-1], self.sides[-2::-1], strict=True))
        paper = self.nets == "paper"
        first = 256 if paper else 32
        direct = paper and len(doublings) > 2  # noqa: PLR2004  split 4 of the paper's table
        inputs = self.channels
        for stage, (low, high) in enumerate(doublings[:-1] if direct else doublings):
            outputs = max(first // 2**stage, 32 if paper else 16)
            yield self._doubling(inputs, outputs, low=low, high=high)
            yield from self._activation(nn.ReLU())
            inputs = outputs
        if not doublings:
            yield _convolution(inputs, first)
            yield from self._activation(nn.ReLU())
            inputs = first
        if direct:
            low, high = doublings[-1]
            yield self._doubling(inputs, self.image_channels, low=low, high=high)
        else:
            yield _convolution(inputs, self.image_channels)

    def _critic(self) -> Iterator[nn.Module]:
        """Yield a convolution, residual blocks, a halving and one score."""
        height, width = self.sides[-1]
        paper = self.nets == "paper"
        channels, blocks = (256, 6) if paper else (32, 2)
        shrink = not paper and min(height, width) > 7  # noqa: PLR2004  to a price 2 cores can pay
        yield nn.Conv2d(self.channels, channels, 3, stride=2 if shrink else 1, padding=1)
        for _ in range(blocks):
            yield ResidualBlock(channels, channels)
        yield nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for _ in range(2 if shrink else 1):
            height, width = -(-height // 2), -(-width // 2)
        yield FlattenLinear(channels * height * width, 1)

    def _activation(self, layer: nn.Module) -> Iterator[nn.Module]:
        if self.activations == "swish":
            yield layer

    def _halving(self, inputs: int, outputs: int) -> nn.Module:
        if self.padded:
            return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        return nn.Conv2d(inputs, outputs, _KERNEL, stride=2)

    def _doubling(self, inputs: int, outputs: int, *, low: Sides, high: Sides) -> nn.Module:
        """Return a transposed convolution from exactly one size to the other."""
        (h, w), (height, width) = low, high
        if not self.padded:
            kernel = height - 2 * h + 2, width - 2 * w + 2
            return nn.ConvTranspose2d(inputs, outputs, kernel, stride=2)
        if self.nets == "small":  # a kernel that the stride divides leaves no checkerboard
            kernel = height - 2 * h + 4, width - 2 * w + 4
            return nn.ConvTranspose2d(inputs, outputs, kernel, stride=2, padding=1)
        added = height - 2 * h + 1, width - 2 * w + 1
        return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=added)


def blueprint(
    image_shape: tuple[int, int, int],
    smashed_shape: tuple[int, ...],
    *,
    nets: str,
    activations: str,
    padding: str,
) -> Blueprint:
    """Return the plan of the networks between images and feature maps.

    Args:
        image_shape: Channels, height, width.
        smashed_shape: Of one row.
        nets: A member of ``NETS``.
        activations: A member of ``ACTIVATIONS``.
        padding: A member of ``PADDINGS``; ``"auto"`` takes the plan with fewest stages, since the
            paper wants the pilot as simple as can be.

    Returns:
        The plan.

    Raises:
        NoPilotError: If no halvings lead from one to the other.
    """
    kinds = {"auto": (True, False), "padded": (True,), "unpadded": (False,)}[padding]
    plans = {padded: _sides(image_shape[1:], padded=padded) for padded in kinds}
    fitting = [
        (sides[: sides.index(smashed_shape[1:]) + 1], padded)
        for padded, sides in plans.items()
        if len(smashed_shape) == len(image_shape) and smashed_shape[1:] in sides
    ]
    if not fitting:
        made = "; ".join(
            f"{'padded' if padded else 'unpadded'}: "
            + (", ".join(f"{height}x{width}" for height, width in sides) or "none")
            for padded, sides in plans.items()
        )
        raise NoPilotError(
            f"smashed rows have shape {smashed_shape}, which no pilot makes of images of shape "
            f"{image_shape}; pilots make any number of channels of these sizes: {made}; cut the "
            "model where it has such feature maps"
        )
    sides, padded = min(fitting, key=lambda plan: len(plan[0]))
    return Blueprint(
        image_channels=image_shape[0],
        channels=smashed_shape[0],
        sides=sides,
        padded=padded,
        nets=nets,
        activations=activations,
    )


def _sides(image: Sides, *, padded: bool) -> tuple[Sides, ...]:
    """Return the sizes that halvings make of an image; without any it stays as it is."""
    found = [image]
    while len(found) <= _STAGES and min(found[-1]) >= (2 if padded else _KERNEL):
        height, width = found[-1]
        if padded:
            found.append((-(-height // 2), -(-width // 2)))
        else:
            found.append(((height - _KERNEL) // 2 + 1, (width - _KERNEL) // 2 + 1))
    return tuple(found)


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _drawn(stream: int, make: Callable[[], Net]) -> Net:
    """Return a network whose weights are a pure function of the stream."""
    with scoped(stream):
        network = make()
        glorot(network)
    return network


LEAST_SIDE = 4
"""Pixels a side must have: two halvings leave one."""

_SLOPE = 0.3  # of the leaky ReLU below zero: Keras's default
_FLOOR = 1e-3  # added to a variance in BatchNorm: Keras's default


class _Unit(nn.Module):
    """Tanh, moved to where pixels lie."""

    def forward(self, made: Float[Tensor, " batch *image"]) -> Float[Tensor, " batch *image"]:
        """Return pixels in [0, 1]."""
        return made.tanh().add(1).div(2)


def network(image_shape: tuple[int, int, int], latent: int, width: int) -> nn.Sequential:
    """Return a generator with fresh weights, Glorot uniform from the global generator.

    Args:
        image_shape: Channels, height, width.
        latent: Size of the noise.
        width: Channels of the first feature maps; the next have a half and a quarter.

    Returns:
        From noise to images.
    """
    channels, *image = image_shape
    half = [-(-side // 2) for side in image]
    quarter = [-(-side // 2) for side in half]
    made = nn.Sequential(
        nn.Linear(latent, width * prod(quarter), bias=False),
        nn.Unflatten(1, (width, *quarter)),
        *_normed(width),
        nn.ConvTranspose2d(width, width // 2, 5, padding=2, bias=False),
        *_normed(width // 2),
        _doubling(width // 2, width // 4, low=quarter, high=half),
        *_normed(width // 4),
        _doubling(width // 4, channels, low=half, high=image),
        _Unit(),
    )
    glorot(made)
    return made


def _normed(channels: int) -> tuple[nn.Module, nn.Module]:
    normed = nn.BatchNorm2d(channels, eps=_FLOOR, track_running_stats=False)
    return normed, nn.LeakyReLU(_SLOPE)


def _doubling(inputs: int, outputs: int, *, low: Sequence[int], high: Sequence[int]) -> nn.Module:
    """Return a transposed convolution from exactly one size to the other."""
    added = [after - 2 * before + 1 for before, after in zip(low, high, strict=True)]
    return nn.ConvTranspose2d(
        inputs, outputs, 5, stride=2, padding=2, output_padding=(added[0], added[1]), bias=False
    )


@lru_cache(maxsize=8)
def skeleton(image_shape: tuple[int, int, int], latent: int, width: int) -> nn.Sequential:
    """Return a generator without weights, to be called with some.

    Args:
        image_shape: Channels, height, width.
        latent: Size of the noise.
        width: Channels of the first feature maps.

    Returns:
        On no device; the same one for equal arguments.
    """
    with torch.device("meta"):
        return network(image_shape, latent, width)
