"""Attributes of images that an adversary may want to know, such as whether a digit is odd.

Here each follows from the name of the image's class. The harness maps the adversary's own labels so
before training, and the oracle the private ones afterwards; an attack sees the values, not the map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from leakbed.contracts import UnfitViewError
from leakbed.lookup import unknown_name

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
_HIGH = 5


class UnfitAttributeError(UnfitViewError):
    """An attribute that a data set's classes do not tell; the message says what fits."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One attribute of the images of one data set.

    Attributes:
        name: A key of ``ATTRIBUTES``.
        values: What each value means, from value 0 on; at least two.
        of_class: The value of each label.
    """

    name: str
    values: tuple[str, ...]
    of_class: tuple[int, ...]

    def of(self, labels: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the attribute's values of labels."""
        return torch.tensor(self.of_class, device=labels.device)[labels]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How an attribute follows from the name of a class.

    Attributes:
        values: What its values mean.
        value: Of one class by its name; None where the name does not tell.
        fits: Which classes it is for, in words.
    """

    values: tuple[str, ...]
    value: Callable[[str], int | None]
    fits: str


def _number(name: str, value: Callable[[int], bool]) -> int | None:
    return int(value(int(name))) if name.isdecimal() else None


def _animal(name: str) -> int | None:
    return int(name in ANIMALS) if name in {*ANIMALS, *VEHICLES} else None


_NUMBERS = "classes named by whole numbers, as digits are"
_KINDS: Mapping[str, _Kind] = {
    "animal": _Kind(
        values=("vehicle", "animal"),
        value=_animal,
        fits=f"classes among {', '.join(sorted((*ANIMALS, *VEHICLES)))}",
    ),
    "high-digit": _Kind(
        values=(f"below {_HIGH}", f"{_HIGH} or more"),
        value=lambda name: _number(name, lambda number: number >= _HIGH),
        fits=_NUMBERS,
    ),
    "parity": _Kind(
        values=("even", "odd"),
        value=lambda name: _number(name, lambda number: number % 2 == 1),
        fits=_NUMBERS,
    ),
}
LABEL = "label"
"""The task's own label, as an attribute of as many values as there are classes."""

ATTRIBUTES = tuple(sorted((*_KINDS, LABEL)))
"""Every attribute's name."""


def attribute_of(name: str, classes: Sequence[str]) -> Attribute:
    """Return an attribute of a data set's images.

    Args:
        name: A member of ``ATTRIBUTES``.
        classes: What each label means.

    Returns:
        The attribute.

    Raises:
        ValueError: There is no such attribute.
        UnfitAttributeError: The classes do not tell it, or all have the same value of it.
    """
    if name not in ATTRIBUTES:
        raise ValueError(unknown_name("attribute", name, ATTRIBUTES))
    found = _found(name, classes)
    if found is None:
        fitting = [other for other in ATTRIBUTES if _found(other, classes) is not None]
        shown = ", ".join(classes) or "unnamed"
        wanted = _KINDS[name].fits if name in _KINDS else "two classes or more"
        raise UnfitAttributeError(
            f"attribute {name!r} needs {wanted}, and more than one value among them; the classes "
            f"here are {shown}; use {' or '.join(fitting) or 'other data'}"
        )
    return found


def _found(name: str, classes: Sequence[str]) -> Attribute | None:
    """Return an attribute; None where the classes do not fit."""
    if name == LABEL:
        values, told = tuple(classes), list[int | None](range(len(classes)))
    else:
        values, told = _KINDS[name].values, [_KINDS[name].value(each) for each in classes]
    of_class = tuple(value for value in told if value is not None)
    if len(of_class) < len(classes) or len(set(of_class)) < 2:  # noqa: PLR2004
        return None
    return Attribute(name=name, values=values, of_class=of_class)
