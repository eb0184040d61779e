"""Attributes follow from the names of classes, and data sets without such names are refused."""

import pytest
import torch

from leakbed.contracts import UnfitViewError
from leakbed.contracts.attributes import ATTRIBUTES, Attribute, UnfitAttributeError, attribute_of

DIGITS = tuple(str(digit) for digit in range(10))
CIFAR = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def test_digits_are_odd_and_high() -> None:
    parity, high = attribute_of("parity", DIGITS), attribute_of("high-digit", DIGITS)
    assert parity.of_class == (0, 1, 0, 1, 0, 1, 0, 1, 0, 1)
    assert parity.values == ("even", "odd")
    assert high.of_class == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert high.values == ("below 5", "5 or more")


def test_the_map_follows_names_and_not_places() -> None:
    assert attribute_of("parity", ("7", "2", "10")).of_class == (1, 0, 0)
    assert attribute_of("animal", ("ship", "frog")).of_class == (0, 1)


def test_six_of_ten_cifar_classes_are_animals() -> None:
    animal = attribute_of("animal", CIFAR)
    named = [animal.values[value] for value in animal.of_class]
    assert [name for name, kind in zip(CIFAR, named, strict=True) if kind == "vehicle"] == [
        "airplane",
        "automobile",
        "ship",
        "truck",
    ]


def test_a_label_is_its_own_attribute() -> None:
    label = attribute_of("label", CIFAR)
    assert label == Attribute(name="label", values=CIFAR, of_class=tuple(range(10)))


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_labels_of_any_shape_are_mapped_and_not_changed(shape: tuple[int, ...]) -> None:
    labels = torch.tensor([3, 0, 9, 4]).reshape(shape)
    found = attribute_of("parity", DIGITS).of(labels)
    assert found.flatten().tolist() == [1, 0, 1, 0]
    assert found.shape == shape
    assert labels.flatten().tolist() == [3, 0, 9, 4]


@pytest.mark.parametrize(
    ("name", "classes", "told"),
    [
        ("parity", CIFAR, "needs classes named by whole numbers.*use animal or label"),
        ("high-digit", (*DIGITS, "ten"), "here are 0, 1, .*ten; use label"),
        ("animal", DIGITS, "needs classes among airplane.*use high-digit or label or parity"),
        ("animal", ("cat", "dog"), "more than one value"),
        ("high-digit", DIGITS[:5], "more than one value.*use label or parity"),
        ("label", ("only",), "use other data"),
        ("parity", (), "unnamed"),
    ],
)
def test_classes_that_do_not_tell_it_are_refused_with_what_fits(
    name: str, classes: tuple[str, ...], told: str
) -> None:
    with pytest.raises(UnfitAttributeError, match=told) as caught:
        attribute_of(name, classes)
    assert isinstance(caught.value, UnfitViewError)


def test_an_unknown_attribute_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'parity'"):
        attribute_of("paritty", DIGITS)
    assert ATTRIBUTES == ("animal", "high-digit", "label", "parity")
