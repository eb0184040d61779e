import pytest
import torch

from leakbed.data import BadDataError, EmptyClassError
from leakbed.data.dataset import Decoded, finished


def decoded(*, rows: int = 20, classes: int = 4, official_test: int = 5) -> Decoded:
    """Rows sorted by class, each image's pixels its own row number."""
    return Decoded(
        images=torch.arange(rows, dtype=torch.uint8).reshape(rows, 1, 1, 1).expand(rows, 1, 2, 2),
        labels=torch.arange(rows) * classes // rows,
        classes=tuple("abcdefgh"[:classes]),
        official_test=official_test,
    )


def test_bytes_become_unit_floats() -> None:
    data = finished("some", decoded())
    assert torch.equal(data.images[:, 0, 0, 0], torch.arange(20) / 255)
    assert (data.name, len(data), data.official_test) == ("some", 20, 5)


def test_thinning_keeps_every_class_and_the_share_of_the_test_part() -> None:
    data = finished("some", decoded(), size=8)
    assert data.labels.bincount().tolist() == [2, 2, 2, 2]
    assert data.official_test == 2
    rows = (data.images[:, 0, 0, 0] * 255).round()
    assert rows.unique().numel() == 8
    assert (rows[-2:] >= 15).all()
    assert (rows[:-2] < 15).all()


def test_all_rows_are_a_legal_size() -> None:
    whole = finished("some", decoded())
    assert torch.equal(finished("some", decoded(), size=20).images, whole.images)


@pytest.mark.parametrize("size", [0, -1, 21])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(BadDataError, match=f"has 20 rows; size={size} must be 1 to 20"):
        finished("some", decoded(), size=size)


def test_a_size_that_empties_a_class_is_refused() -> None:
    with pytest.raises(EmptyClassError, match="class 'b' has no image among the 2 rows kept"):
        finished("some", decoded(), size=2)


def test_small_integer_labels_become_int64() -> None:
    some = decoded()
    narrow = Decoded(images=some.images, labels=some.labels.to(torch.uint8), classes=some.classes)
    assert finished("some", narrow).labels.dtype == torch.int64


def masks(dtype: torch.dtype, *, brightest: float = 1) -> Decoded:
    pixels = torch.zeros(20, 1, 2, 2)
    pixels[::2, :, 0] = brightest
    labels = torch.arange(20) % 2
    return Decoded(images=pixels.to(dtype), labels=labels, classes=("a", "b"))


def test_bytes_of_zero_and_one_are_refused_and_not_taken_for_black() -> None:
    told = r"uint8 pixels run from 0 to 1; multiply by 255, or give bool"
    with pytest.raises(BadDataError, match=told):
        finished("masks", masks(torch.uint8))
    assert finished("masks", masks(torch.uint8, brightest=2)).images.max() == 2 / 255


def test_bool_pixels_are_zero_and_one() -> None:
    images = finished("masks", masks(torch.bool)).images
    assert images.dtype == torch.float32
    assert images.unique().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_that_were_divided_twice_are_refused(dtype: torch.dtype) -> None:
    told = r"float pixels run from 0 to 0\.0039\d+, none brighter than 1/255; multiply by 255"
    with pytest.raises(BadDataError, match=told):
        finished("masks", masks(dtype, brightest=1 / 255))
    finished("masks", masks(dtype, brightest=2 / 255))
