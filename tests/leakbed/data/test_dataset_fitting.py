import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from leakbed.data.dataset import fitted

COLOUR = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_nothing_changes_where_the_shape_fits() -> None:
    assert fitted(COLOUR, shape=(3, 12, 12)) is COLOUR


def test_grey_is_what_pillow_makes_of_colour() -> None:
    grey = fitted(COLOUR, shape=(1, 12, 12))
    image = functional.to_pil_image(COLOUR[0])
    assert isinstance(image, Image.Image)
    expected = functional.pil_to_tensor(image.convert("L")) / 255
    assert torch.allclose(grey[0], expected, atol=2 / 255)


def test_colour_repeats_grey() -> None:
    grey = COLOUR[:, :1]
    coloured = fitted(grey, shape=(3, 12, 12))
    assert all(torch.equal(coloured[:, i], grey[:, 0]) for i in range(3))
    assert coloured.is_contiguous()


def test_size_is_changed_as_pillow_does_it() -> None:
    image = functional.to_pil_image(COLOUR[1]).resize((6, 9), Image.Resampling.BILINEAR)
    expected = functional.pil_to_tensor(image) / 255
    found = fitted(COLOUR, shape=(3, 9, 6))
    assert found.shape == (2, 3, 9, 6)
    assert torch.allclose(found[1], expected, atol=2 / 255)
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be given {channels}"):
        fitted(COLOUR, shape=(channels, 12, 12))
