"""The table of biopsies: its numbers are the package's, one label in ten is positive."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from sklearn.datasets import load_breast_cancer

from leakbed.data import MissingDataError, load, sources
from leakbed.data.partitioning import strip
from leakbed.models import Architecture, IllegalCutError
from strategies.vertical_split import party_architectures


def test_one_label_in_ten_is_malignant() -> None:
    data = load("breast-cancer")
    assert data.images.shape == (397, 1, 3, 10)
    assert data.labels.bincount().tolist() == [357, 40]
    assert data.classes == ("benign", "malignant")
    assert data.official_test == 0


def test_rows_are_the_packages_own_standardised() -> None:
    data = load("breast-cancer")
    table, benign = load_breast_cancer(return_X_y=True)
    features = data.images.flatten(1).double()
    # Every kept row is one of the package's, of the same label, up to each feature's scale.
    inside = (features > 0) & (features < 1)
    for feature in range(30):
        own = torch.from_numpy(table[:, feature])
        kept = inside[:, feature]
        values = features[kept, feature]
        rows = torch.from_numpy(_kept(benign))[kept]
        line = torch.stack([own[rows], torch.ones(len(rows), dtype=torch.double)], 1)
        fitted = line @ torch.linalg.lstsq(line, values).solution
        assert torch.allclose(fitted, values, atol=1e-6)
    assert torch.equal(data.labels == 1, torch.from_numpy(benign[_kept(benign)] == 0))
    assert features.mean(0).sub(0.5).abs().max() < 0.02  # what lies beyond three deviations is cut
    assert features.std(0).sub(1 / 6).abs().max() < 0.06


def _kept(benign: ndarray) -> ndarray:
    """Every benign row, and of each 5.3 malignant ones the first."""
    malignant, seen = [], 0
    for row, label in enumerate(benign):
        if label == 0:
            if len(malignant) * 212 // 40 == seen:
                malignant.append(row)
            seen += 1
    others = [row for row, label in enumerate(benign) if label == 1]
    return np.array(sorted([*malignant[:40], *others]))


def test_it_needs_no_folder_and_not_the_package_itself(tmp_path: Path) -> None:
    assert load("breast-cancer") is load("breast-cancer", root=tmp_path)
    code = "import sys, leakbed.data as d; d.load('breast-cancer'); print('sklearn' in sys.modules)"
    run = subprocess.run(  # noqa: S603  our own interpreter and text
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("installed", [True, False])
def test_without_the_file_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, installed: bool
) -> None:
    spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda _: spec if installed else None)
    with pytest.raises(MissingDataError, match="install scikit-learn"):
        sources.read_breast_cancer()


def test_a_strip_holds_whole_measurements_and_parties_are_summed() -> None:
    images = load("breast-cancer").images
    assert strip(images, party=1, parties=2).shape == (397, 1, 3, 5)
    model = Architecture(name="tabular-mlp", image_shape=(1, 3, 10), num_classes=2, cut=3)
    parties = party_architectures(model, nodes=2, merge="sum")
    assert [party.image_shape for party in parties] == [(1, 3, 5)] * 2
    with pytest.raises(IllegalCutError, match="cut 3 with 'sum'"):
        party_architectures(model, nodes=2, merge="concat")
