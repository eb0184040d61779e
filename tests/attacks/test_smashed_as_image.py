"""The smashed map as a picture: where windows lie, what has no map, what is not finite."""

import pytest
import torch
from torch import Tensor, nn

from attacks.smashed_as_image import REDUCTIONS, SmashedAsImage, _windows
from leakbed.contracts import Attack, MissingKnowledgeError, Seat, View
from leakbed.models import Architecture
from leakbed.seeds import generator


def view(cut: int, smashed: Tensor | None = None, channels: int = 1) -> View:
    layers = Architecture(name="mnistnet", image_shape=(channels, 28, 28), num_classes=10, cut=cut)
    return View(
        seat=Seat.SERVER,
        image_shape=(channels, 28, 28),
        num_classes=10,
        targets=2 if smashed is None else len(smashed),
        smashed=smashed,
        architecture=layers,
    )


def spot(row: int, column: int) -> Tensor:
    """An image that is a smooth bump around one pixel."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    return torch.exp(-((rows - row).square() + (columns - column).square()) / 8)[None, None]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_spot_appears_where_it_is(reduction: str, cut: int) -> None:
    attack = SmashedAsImage(reduction=reduction)
    bottom = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10).build(0)
    for layer in bottom:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.04)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        smashed = bottom[: cut + 1](spot(10, 18))
    image = attack.run(view(cut, smashed), seed=0).images[0, 0, 0]
    total = image.sum()
    rows, columns = (image.sum(axis) / total @ torch.arange(28.0) for axis in (1, 0))
    assert rows.item() == pytest.approx(10, abs=0.6)
    assert columns.item() == pytest.approx(18, abs=0.6)
    assert image.min() == 0
    assert image.max() == 1


def test_windows_of_layers_with_padding_stride_and_dilation() -> None:
    assert _windows(nn.Sequential(nn.Conv2d(1, 1, 5), nn.ReLU(), nn.MaxPool2d(2))) == [(3, 2)] * 2
    assert _windows(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))) == [(0.5, 1)] * 2
    assert _windows(nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"))) == [(0.5, 1)] * 2
    assert _windows(nn.Sequential(nn.Conv2d(1, 1, 3, padding="valid"))) == [(1.5, 1)] * 2
    uneven = nn.Conv2d(1, 1, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1))
    assert _windows(nn.Sequential(uneven)) == [(2.5, 1), (0.5, 2)]


def test_a_row_that_is_no_map_becomes_a_square_in_every_colour() -> None:
    smashed = torch.rand(2, 120, generator=generator(1))
    guess = SmashedAsImage().run(view(7, smashed, channels=3), seed=0)
    assert guess.images.shape == (2, 1, 3, 28, 28)
    assert torch.equal(guess.images[:, :, 0], guess.images[:, :, 2])
    assert not guess.failed.any()


def test_a_row_that_is_not_finite_is_grey_and_failed() -> None:
    smashed = torch.rand(3, 8, 24, 24, generator=generator(1))
    sound = SmashedAsImage().run(view(1, smashed), seed=0)
    smashed = smashed.clone()
    smashed[1, 2, 3, 4] = torch.inf
    broken = SmashedAsImage().run(view(1, smashed), seed=0)
    assert broken.failed.tolist() == [False, True, False]
    assert (broken.images[1] == 0.5).all()
    assert torch.equal(broken.images[[0, 2]], sound.images[[0, 2]])


def test_what_is_missing_or_unknown_is_said() -> None:
    assert isinstance(SmashedAsImage(), Attack)
    with pytest.raises(MissingKnowledgeError, match="lacks smashed"):
        SmashedAsImage().run(view(1), seed=0)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        SmashedAsImage(reduction="meen")
