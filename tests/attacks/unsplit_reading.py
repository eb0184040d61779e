"""A slow literal reading of UnSplit, and small victims to read it on."""

import torch
from torch import Tensor, nn

from attacks.unsplit import UnSplit
from leakbed.contracts import Seat, View
from leakbed.models import Architecture
from leakbed.seeds import derive, generator

SEED = 4
DIGIT = (1, 28, 28)


def architecture(cut: int, name: str = "mnistnet") -> Architecture:
    shape = (3, 8, 8) if name == "cifarnet" else DIGIT
    return Architecture(name=name, image_shape=shape, num_classes=10, cut=cut)


def images(count: int, shape: tuple[int, int, int] = DIGIT) -> Tensor:
    coarse = torch.rand(count, shape[0], 7, 7, generator=generator(8))
    return nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")


def view_of(
    victim: nn.Module, private: Tensor, layers: Architecture, dtype: torch.dtype = torch.float32
) -> View:
    with torch.no_grad():
        smashed = victim.to(dtype)(private.to(dtype))
    return View(
        seat=Seat.SERVER,
        image_shape=layers.image_shape,
        num_classes=10,
        targets=len(private),
        smashed=smashed,
        architecture=layers,
    )


def small_view(cut: int = 1, targets: int = 3, dtype: torch.dtype = torch.float32) -> View:
    layers = architecture(cut)
    return view_of(layers.bottom(1000), images(targets), layers, dtype)


def variation(image: Tensor) -> Tensor:
    """UnSplit's total variation of one image: squared differences, averaged per direction."""
    _, channels, height, width = image.shape
    down = (image[:, :, 1:] - image[:, :, :-1]).square().sum() / (channels * (height - 1) * width)
    right = (image[..., 1:] - image[..., :-1]).square().sum() / (channels * height * (width - 1))
    return down + right


def literal(clone: nn.Module, row: Tensor, layers: Architecture, attack: UnSplit) -> Tensor:
    """The paper's algorithm for one target; trains the clone it is given."""
    image = torch.full((1, *layers.image_shape), 0.5, dtype=row.dtype, requires_grad=True)
    on_image = torch.optim.Adam([image], lr=attack.input_rate, amsgrad=True)
    on_clone = torch.optim.Adam(clone.parameters(), lr=attack.model_rate, amsgrad=True)
    for _ in range(attack.outer_steps):
        for _ in range(attack.input_steps):
            on_image.zero_grad()
            loss = nn.functional.mse_loss(clone(image), row)
            loss = loss + attack.tv * variation(image) + attack.l2 * image.square().mean()
            loss.backward()
            on_image.step()
        for _ in range(attack.model_steps):
            on_clone.zero_grad()
            nn.functional.mse_loss(clone(image), row).backward()
            on_clone.step()
    return image.detach()


def first_clone(layers: Architecture, target: int) -> nn.Sequential:
    return layers.bottom(derive(derive(SEED, "restart/0"), f"clone/{target}"))


# Not below mnistnet's second pool: on the published start, a constant image, every window ties, and
# there rounding decides which pixel gets the gradient.
