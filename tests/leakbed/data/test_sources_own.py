import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from leakbed.data import BadDataError, EmptyClassError, UnknownDatasetError, load


@pytest.fixture(autouse=True)
def own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "support"))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)


def test_grey_bytes_become_one_channel_in_unit_range() -> None:
    data = load("own_data:grey_bytes")
    assert data.images.shape == (12, 1, 4, 5)
    assert data.image_shape == (1, 4, 5)
    assert data.images.dtype == torch.float32
    assert data.images[3].unique().tolist() == [1]
    assert data.images[[0, 1, 2, *range(4, 12)]].unique().tolist() == [0]
    assert data.labels.tolist() == [0, 1, 2] * 4
    assert data.classes == ("0", "1", "2")


def test_floats_keep_their_values_and_class_names() -> None:
    data = load("own_data:colour_floats")
    assert data.images.dtype == torch.float32
    assert data.images.max() == 1
    assert data.classes == ("cat", "dog", "eel")
    assert data.num_classes == 3
    assert len(data) == 12


def test_the_root_reaches_a_function_that_asks_for_it(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.full((12, 4, 4), 9, dtype=np.uint8))
    assert load("own_data:from_root", root=tmp_path).images.unique().tolist() == [
        np.float32(9 / 255)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normalised", r"pixels run from -1.5 to -1.5.*undo any normalisation"),
        ("not_finite", r"1 images hold NaN or infinity, the first is row 7"),
        ("wide_integers", r"images are torch.int32; give uint8"),
        ("flat", r"images have shape \(12, 16\); give rows x channels"),
        ("nothing", r"images have shape \(0, 1, 4, 4\)"),
        ("few_labels", r"labels have shape \(5,\), but there are 12 images"),
        ("float_labels", r"labels are torch.float64; give whole numbers"),
        ("negative_labels", r"labels run from -1 to 1.*0 to 1"),
        ("too_few_names", r"labels run from 0 to 2; with 2 classes"),
        ("huge_label", r"highest label is 1000000000002, but there are only 12"),
        ("one_thing", r"returned a ndarray; return \(images, labels\)"),
        ("no_arrays", r"returned a str that is no array"),
        ("breaks", r"raised RuntimeError: no such server \(own_data.py, line \d+\)"),
        ("demanding", r"missing a required argument: 'folder'; .* and with nothing else"),
        ("NOT_A_FUNCTION", r"is a int, not a function"),
        (
            "channels_last",
            r"\(12, 16, 16, 3\), which looks channels-last; .*moveaxis\(images, -1, 1",
        ),
        ("grey_channel_last", r"\(12, 16, 8, 1\), which looks channels-last"),
        ("rows_last", r"12 labels.*the rows seem to come last; .*moveaxis\(images, -1, 0\)"),
        ("over_one", r"pixels run from 0.25 to 1.00001; .*the first is in row 5"),
        ("sparse", r"returned a Tensor that is no array: .*sparse"),
        ("eight_bit_floats", r"images are torch.float8_e5m2; give uint8"),
        ("nowhere", r"returned a Tensor that is no array"),
        ("one_hot", r"labels have shape \(12, 3\).*argmax"),
        ("names_of_bytes", r"class '.udce9' has a name that is no text; rename it"),
        ("names_that_are_none", r"class names are a int; give a list"),
        ("leaves", r"raised SystemExit: 3"),
    ],
)
def test_unusable_data_say_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        load(f"own_data:{name}")


def test_a_class_without_rows_is_refused() -> None:
    with pytest.raises(EmptyClassError, match="class '1' has no image"):
        load("own_data:gap_in_labels")


def test_a_function_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UnknownDatasetError, match="did you mean 'grey_bytes'"):
        load("own_data:gray_bytes")
    with pytest.raises(UnknownDatasetError, match="cannot import 'no_such_package'"):
        load("no_such_package:f")


def test_rounding_errors_beyond_the_range_are_clipped() -> None:
    images = load("own_data:just_over_one").images
    assert images.unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", ["many_narrow_channels", "lazy"])
def test_unusual_data_are_taken_as_they_are(name: str) -> None:
    assert len(load(f"own_data:{name}")) == 12
