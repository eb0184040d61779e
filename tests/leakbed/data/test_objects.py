"""Data handed over as objects: what they become, and what is refused with its row."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from leakbed.data import BadDataError, load
from leakbed.data.objects import Table, lend_rows
from leakbed.lookup import import_object

IMAGES = torch.rand(6, 1, 4, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
PAIRS = list(zip(IMAGES, LABELS.tolist(), strict=True))
NUMBERS = np.array([[1.0, 50.0, 7.0], [2.0, 90.0, 7.0], [9.0, 10.0, 7.0], [4.0, 20.0, 7.0]])


class Named(Dataset[Any]):
    """Has names of its classes, as torchvision's have."""

    classes = ("low", "middle", "high")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return IMAGES[row], LABELS[row]


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        tuple(PAIRS),
        TensorDataset(IMAGES, LABELS),
        Subset(TensorDataset(IMAGES, LABELS), range(6)),
        Named(),
        (IMAGES, LABELS),
        (IMAGES.numpy(), LABELS.numpy(), ["low", "middle", "high"]),
        [(image[0].numpy(), np.int64(label)) for image, label in PAIRS],
    ],
    ids=lambda data: type(data).__name__,
)
def test_rows_are_the_same_however_they_come(data: object) -> None:
    dataset = load(lend_rows(data))
    assert torch.equal(dataset.images, IMAGES)
    assert torch.equal(dataset.labels, LABELS)
    names = ("low", "middle", "high") if isinstance(data, Named) else ("0", "1", "2")
    assert dataset.classes in {names, ("low", "middle", "high")}


def test_equal_rows_have_one_name_and_others_another() -> None:
    assert lend_rows(PAIRS) == lend_rows(TensorDataset(IMAGES, LABELS))
    assert lend_rows((IMAGES, LABELS)) != lend_rows((IMAGES, LABELS.flip(0)))


def test_pictures_keep_their_colours_and_bytes() -> None:
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3) * 2
    coloured = [(Image.fromarray(each), place) for place, each in enumerate(pixels)]
    dataset = load(lend_rows(coloured))
    torch.testing.assert_close(dataset.images, torch.tensor(pixels).permute(0, 3, 1, 2) / 255)
    grey = [(Image.fromarray(each[:, :, 0]), place) for place, each in enumerate(pixels)]
    assert load(lend_rows(grey)).image_shape == (1, 4, 5)


def test_a_table_is_standardised_on_request() -> None:
    dataset = load(lend_rows(Table(NUMBERS, [0, 1, 0, 1], ("no", "yes"), standardise=True)))
    assert (dataset.image_shape, dataset.classes) == ((1, 1, 3), ("no", "yes"))
    columns = dataset.images[:, 0, 0].double().numpy()
    wanted = (NUMBERS - NUMBERS.mean(0)) / np.where(NUMBERS.std(0) > 0, NUMBERS.std(0), 1)
    np.testing.assert_allclose(columns, wanted / 6 + 0.5, atol=1e-6)
    assert (columns[:, 2] == 0.5).all()  # the same in all rows
    plain = load(lend_rows((NUMBERS / 100, [0, 1, 0, 1])))
    np.testing.assert_allclose(plain.images[:, 0, 0].numpy(), NUMBERS / 100, atol=1e-7)
    far = np.zeros((200, 1))
    far[0] = 1e6
    cut = load(lend_rows(Table(far, [0, 1] * 100, standardise=True))).images
    assert float(cut.max()) == 1


class Raising(Named):
    """Breaks in its third row."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row == 2:
            raise OSError("no such file")
        return super().__getitem__(row)


class Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(PAIRS)


ONES = torch.ones(1, 4, 5)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([(ONES, 0), (torch.ones(1, 4, 4), 1)], r"image of row 1 is \(1, 4, 4\) of float32, that"),
        ([(ONES, 0), (ONES.double(), 1)], r"row 1 is \(1, 4, 5\) of float64"),
        ([(ONES, 0), (ONES, 1.0)], r"label of row 1 is 1\.0; give a whole number"),
        ([(ONES, 0), (ONES, torch.tensor([1]))], "label of row 1 is tensor"),
        ([(ONES, True)], "label of row 0 is True"),
        ([(ONES, "cat")], "label of row 0 is 'cat'"),
        ([(ONES, 0), ONES], "row 1 is a Tensor, no .image, label. pair"),
        ([{"image": ONES, "label": 0}], "row 0 is a dict"),
        ([(ONES, 0, 1)], "row 0 is a tuple of 3"),
        ([], "data list: there is no row"),
        (Raising(), r"data Raising: row 2 raised OSError: no such file"),
        (Endless(), "data Endless: this is nothing to read rows from; give a torch Dataset"),
        (DataLoader(Named()), "data DataLoader: this is nothing"),
        (IMAGES, "data Tensor: this is nothing"),
        ([("a picture", 0)], "the image of row 0: a str is no array of numbers"),
        ((NUMBERS, [0, 1, 0, 1]), r"columns run from 1 to 90; bring them to 0 to 1.*standardise="),
        (Table(NUMBERS[0], [0]), r"features have shape \(3,\); give rows x columns"),
        (Table([["a", 1]], [0]), "columns are not all numbers"),
        (Table([[1.0], [np.nan]], [0, 1], standardise=True), "row 1 has NaN or infinity in column"),
        ((IMAGES, [0, 1, 2, 0, 1, 9]), "highest label is 9, but there are only 6 rows"),
    ],
)
def test_what_is_no_data_is_named_with_its_row(data: object, said: str) -> None:
    with pytest.raises(BadDataError, match=said):
        lend_rows(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((IMAGES * 3, LABELS), "'leakbed.objects:data_.*pixels run from"),
        ((IMAGES, LABELS[:5]), "labels have shape"),
        ((IMAGES, LABELS.double()), "labels are torch.float64"),
        ((IMAGES.permute(0, 2, 3, 1).repeat(1, 2, 2, 1), LABELS), "looks channels-last"),
        ((IMAGES.long(), LABELS), "images are torch.int64"),
        (Table(NUMBERS / 100, [0.5, 1, 0, 1]), "data_.*labels are torch.float64"),
    ],
)
def test_what_every_data_set_is_held_to_holds_here_too(data: object, said: str) -> None:
    with pytest.raises(BadDataError, match=said):
        load(lend_rows(data))


def test_the_function_behind_a_name_returns_what_was_handed_over() -> None:
    given = IMAGES.clone()
    function = import_object(lend_rows((given, LABELS)))
    given.zero_()  # later changes of the caller's change nothing
    assert callable(function)
    assert torch.equal(function()[0], IMAGES)
