"""The smashed map shown as a picture: what convolutional smashed data reveal without any attack.

The channels of each row's map are reduced to one, which is laid over the image where the layers'
windows put it, and stretched to [0, 1]. On digits this already correlates at about 0.8 with the
private image after the first activation and pool, so an inversion has to beat it.

Own baseline. Where windows lie: Araujo, Norris, Sim, *Computing Receptive Fields of Convolutional
Neural Networks*, Distill 2019, https://doi.org/10.23915/distill.00021.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    View,
)
from leakbed.naming import unknown

Maps = Float[Tensor, " targets channels map_height map_width"]
Picture = Float[Tensor, " targets map_height map_width"]


def _principal(maps: Maps) -> Picture:
    """Return the one combination of a row's channels that explains most of them."""
    flat = maps.flatten(2)
    _, directions = torch.linalg.eigh(flat @ flat.transpose(1, 2))
    weights = directions[..., -1]
    weights = weights * (weights.sum(1, keepdim=True) >= 0).to(weights).mul(2).sub(1)
    return torch.einsum("tc,tchw->thw", weights, maps)


REDUCTIONS: dict[str, Callable[[Maps], Picture]] = {
    "principal": _principal,
    "mean": lambda maps: maps.mean(1),
    "max": lambda maps: maps.amax(1),
    "norm": lambda maps: maps.norm(dim=1),
}


@dataclass(frozen=True, kw_only=True)
class SmashedAsImage:
    """Show each smashed row as a picture.

    Attributes:
        reduction: How channels become one. ``"principal"`` is the best of the four on training
            images over trained and fresh networks; it is the first singular vector of a row's own
            channels, its sign chosen for a positive sum of weights.
    """

    reduction: str = "principal"

    name: ClassVar[str] = "smashed-as-image"
    source: ClassVar[str] = "own baseline: shows the evidence, attacks nothing"

    def __post_init__(self) -> None:
        """Check the setting.

        Raises:
            ValueError: The reduction is none of the legal ones.
        """
        if self.reduction not in REDUCTIONS:
            raise ValueError(unknown("reduction", self.reduction, REDUCTIONS))

    @property
    def threat(self) -> ThreatModel:
        """A server that looks at what it receives, and knows where the layers' windows lie."""
        return ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({Evidence.SMASHED}),
            needs=frozenset({Knowledge.ARCHITECTURE}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Show every smashed row.

        Args:
            view: With ``smashed`` and ``architecture``. A row that is no map is laid out as a
                square in its own order.
            seed: Not used; nothing is random.

        Returns:
            Images, the same in every colour; a row that is not finite is grey and failed.

        Raises:
            MissingKnowledgeError: There are no smashed data, or no architecture.
        """
        del seed
        if view.smashed is None or view.architecture is None:
            raise MissingKnowledgeError(
                "smashed-as-image shows smashed data where the bottom's layers put them; the view "
                f"lacks {'smashed' if view.smashed is None else 'architecture'}: attack a split "
                "protocol"
            )
        finite = view.smashed.isfinite().flatten(1).all(1)
        smashed = view.smashed.detach().nan_to_num(0, 0, 0)
        smashed = smashed * finite.reshape(-1, *[1] * (smashed.ndim - 1))
        sides = view.image_shape[1:]
        if smashed.ndim == 4:  # noqa: PLR2004  targets, channels, height, width
            picture = REDUCTIONS[self.reduction](smashed)
            windows = _windows(view.architecture.bottom(0))
            picture = _laid_over(picture, windows, sides)
        else:
            picture = _resized(_square(smashed.flatten(1)), sides)
        images = _stretched(picture)[:, None, None].repeat(1, 1, view.image_shape[0], 1, 1)
        return Guess(images=images, failed=~finite)


def _windows(bottom: nn.Sequential) -> list[tuple[float, float]]:
    """Return, along height and width, the centre of the first window and the step to the next.

    Both in pixels; a layer without a window leaves them as they are.
    """
    found = []
    for axis in (0, 1):
        centre, step = 0.5, 1.0
        for layer in bottom:
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                kernel, stride = _side(layer.kernel_size, axis), _side(layer.stride, axis)
                dilation = _side(getattr(layer, "dilation", 1), axis)
                reach = dilation * (kernel - 1) / 2
                centre += (reach - _padding(layer.padding, axis, same=reach)) * step
                step *= stride
        found.append((centre, step))
    return found


def _side(setting: int | tuple[int, ...], axis: int) -> int:
    """Return a layer's setting along one axis."""
    return setting if isinstance(setting, int) else setting[axis]


def _padding(setting: str | int | tuple[int, ...], axis: int, *, same: float) -> float:
    """Return the pixels added before the map, which torch also lets one set by name."""
    if isinstance(setting, str):
        return same if setting == "same" else 0
    return _side(setting, axis)


def _laid_over(
    picture: Picture, windows: list[tuple[float, float]], sides: tuple[int, int]
) -> Float[Tensor, " targets height width"]:
    """Return the picture at the image's pixels, with its border repeated outwards."""
    grid = []
    for length, side, (centre, step) in zip(picture.shape[1:], sides, windows, strict=True):
        pixels = torch.arange(side, dtype=picture.dtype, device=picture.device) + 0.5
        grid.append(((pixels - centre) / step + 0.5) / length * 2 - 1)
    rows, columns = torch.meshgrid(*grid, indexing="ij")
    places = torch.stack((columns, rows), -1).expand(len(picture), -1, -1, -1)
    laid = functional.grid_sample(
        picture[:, None], places, padding_mode="border", align_corners=False
    )
    return laid[:, 0]


def _square(rows: Float[Tensor, " targets features"]) -> Picture:
    """Return each row as the smallest square that holds it, filled up with zeros."""
    side = ceil(sqrt(rows.shape[1]))
    return functional.pad(rows, (0, side**2 - rows.shape[1])).reshape(-1, side, side)


def _resized(picture: Picture, sides: tuple[int, int]) -> Float[Tensor, " targets height width"]:
    """Return the picture at another size."""
    return functional.interpolate(picture[:, None], size=sides, mode="bilinear")[:, 0]


def _stretched(
    picture: Float[Tensor, " targets height width"],
) -> Float[Tensor, " targets height width"]:
    """Return each picture stretched to [0, 1]; one without contrast becomes mid-grey."""
    low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
    flat = high == low
    return torch.where(flat, 0.5, (picture - low) / torch.where(flat, 1, high - low))
