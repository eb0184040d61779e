"""Data that are handed over as an object: a torch Dataset, pairs, arrays or a table.

Whatever they were, they are decoded once, when they are handed over, and checked like all data; an
error names the row at fault. Augmentations of a Dataset are drawn once, with it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from leakbed.data.dataset import BadDataError
from leakbed.data.memory import refuse_too_large
from leakbed.data.sources import standardised
from leakbed.lookup import format_error
from leakbed.objects import lend_data

Rows = tuple[Tensor, Tensor, tuple[str, ...]]
_PAIR, _NAMED, _TABLE, _COLOURED = 2, 3, 2, 3  # parts of a pair, with classes; axes of arrays
_HOW = (
    "give a torch Dataset or a list of (image, label) pairs, arrays as (images, labels), a "
    "leakbed.Table(features, labels), or a function that returns arrays"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Arrays:
    images: Any
    labels: Any
    classes: Iterable[object]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers as data: every row is an image of one channel, one pixel high.

    Attributes:
        features: Rows x columns: an array, or a table that NumPy can read.
        labels: Class of each row, from 0.
        classes: Their names; numbers if empty.
        standardise: Whether each column is brought to [0, 1] by its mean and standard deviation
            over all rows, test rows included; what lies beyond three of them is cut off. Without
            it, numbers must lie in [0, 1] already.
    """

    features: Any
    labels: Any
    classes: Sequence[str] = ()
    standardise: bool = False


def decoded(data: object) -> Rows:
    """Return the rows of data that were handed over; the caller's own function checks contents.

    Args:
        data: A torch Dataset or another sequence of pairs, ``(images, labels)`` or ``(images,
            labels, classes)`` as arrays, or a :class:`Table`. Arrays of two axes are a table.

    Returns:
        Images, labels and the names of classes.

    Raises:
        BadDataError: It is nothing of the kind, or a row is none like the others; says which.
    """
    name = called(data)
    if isinstance(data, Table):
        found = _Arrays(images=_columns(name, data), labels=data.labels, classes=data.classes)
    elif isinstance(data, tuple) and len(data) in {_PAIR, _NAMED} and _is_array(data[0]):
        images, labels, *classes = data
        if len(np.shape(images)) == _TABLE:
            images = _columns(name, Table(images, labels))
        found = _Arrays(images=images, labels=labels, classes=classes[0] if classes else ())
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, _NONE):
        found = _paired(name, data)
    else:
        raise BadDataError(f"data {name}: this is nothing to read rows from; {_HOW}")
    images, labels = _tensor(name, "images", found.images), _tensor(name, "labels", found.labels)
    return images, labels, _classes(name, labels, found.classes)


_NONE = (str, bytes, dict, set, ndarray, Tensor)


def lend_rows(data: object) -> str:
    """Return an import path for data that were handed over, the same for equal rows.

    What is no data raises as in :func:`decoded`.

    Args:
        data: As for :func:`decoded`.

    Returns:
        Of a function of :mod:`leakbed.objects`, as a user's module would have it.
    """
    rows = decoded(data)
    return lend_data(lambda: rows, content=_checksum(rows))


def _checksum(rows: Rows) -> str:
    images, labels, classes = rows
    digest = hashlib.sha256(repr((classes, *(_form(each) for each in rows[:2]))).encode())
    for tensor in (images, labels):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def called(data: object) -> str:
    """Return what data are called in messages and names: by their class."""
    return type(data).__name__


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), str(tensor.dtype)


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") and not _is_picture(value)


def _is_picture(value: object) -> bool:
    """Say whether a value is an image of Pillow."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _columns(name: str, table: Table) -> Tensor:
    """Return a table's rows as images one pixel high."""
    try:
        features = np.asarray(table.features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadDataError(
            f"data {name}: columns are not all numbers ({error}); number what is text first"
        ) from error
    if features.ndim != _TABLE or 0 in features.shape:
        raise BadDataError(
            f"data {name}: features have shape {features.shape}; give rows x columns, none 0"
        )
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise BadDataError(
            f"data {name}: row {row} has NaN or infinity in column {column}; leave such rows out, "
            "or fill them"
        )
    if table.standardise:
        features = standardised(features)
    elif features.min() < 0 or features.max() > 1:
        raise BadDataError(
            f"data {name}: columns run from {features.min():g} to {features.max():g}; bring them "
            "to 0 to 1, or give leakbed.Table(features, labels, standardise=True)"
        )
    return torch.from_numpy(features.astype(np.float32))[:, None, None, :]


def _paired(name: str, pairs: Any) -> _Arrays:  # noqa: ANN401  whatever has rows
    """Return the images and labels of pairs, one row after another."""
    if len(pairs) == 0:
        raise BadDataError(f"data {name}: there is no row; {_HOW}")
    images: list[Tensor] = []
    labels: list[int] = []
    for row in range(len(pairs)):
        image, label = _pair(name, pairs, row)
        if images and _form(image) != _form(images[0]):
            raise BadDataError(
                f"data {name}: the image of row {row} is {_words(image)}, that of row 0 "
                f"{_words(images[0])}; make all alike"
            )
        if not images:
            refuse_too_large(f"data {name}", (len(pairs), *image.shape))
        images.append(image)
        labels.append(label)
    stacked = torch.stack(images)
    if stacked.ndim == _TABLE:
        stacked = _columns(name, Table(stacked, labels))
    return _Arrays(images=stacked, labels=labels, classes=_listed(getattr(pairs, "classes", ())))


def _pair(name: str, pairs: Any, row: int) -> tuple[Tensor, int]:  # noqa: ANN401  as above
    try:
        pair = pairs[row]
    except Exception as error:  # a user's Dataset may raise anything
        raise BadDataError(f"data {name}: row {row} raised {format_error(error)}") from error
    if not isinstance(pair, tuple | list) or len(pair) != _PAIR:
        seen = f"a {type(pair).__name__}" + (
            f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        )
        raise BadDataError(f"data {name}: row {row} is {seen}, no (image, label) pair; {_HOW}")
    image, label = pair
    if _is_picture(image):
        image = np.array(image.convert("RGB") if image.mode == "P" else image)
        image = np.moveaxis(image, -1, 0) if image.ndim == _COLOURED else image
    return _tensor(name, f"the image of row {row}", image), _label(name, row, label)


def _label(name: str, row: int, label: Any) -> int:  # noqa: ANN401  as above
    """Return a label as a number; what would be rounded to one is none."""
    given = np.asarray(label)
    if given.ndim or given.dtype.kind not in "iu":
        raise BadDataError(
            f"data {name}: the label of row {row} is {label!r}; give a whole number, the class's "
            "index from 0"
        )
    return int(given)


def _tensor(name: str, what: str, value: Any) -> Tensor:  # noqa: ANN401  as above
    """Return a value as a tensor of its own."""
    try:
        return (
            torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
            .detach()
            .cpu()
            .clone()
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadDataError(
            f"data {name}: {what}: a {type(value).__name__} is no array of numbers ({error})"
        ) from error


def _words(image: Tensor) -> str:
    return f"{tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"


def _listed(classes: object) -> tuple[str, ...]:
    """Return the names of classes that a Dataset has, if it has any."""
    named = isinstance(classes, list | tuple) and all(isinstance(each, str) for each in classes)
    return tuple(classes) if named and isinstance(classes, list | tuple) else ()


def _classes(name: str, labels: Tensor, given: Iterable[object]) -> tuple[str, ...]:
    """Return the names of classes; without any, their numbers."""
    if names := tuple(str(each) for each in given):
        return names
    if labels.is_floating_point() or labels.ndim != 1 or not labels.numel():
        return ("0",)  # refused with its reason when the rows are checked
    highest = int(labels.max())
    if highest >= labels.numel():
        raise BadDataError(
            f"data {name}: the highest label is {highest}, but there are only {labels.numel()} "
            "rows; number the classes from 0 without gaps"
        )
    return tuple(str(number) for number in range(max(highest, 0) + 1))
