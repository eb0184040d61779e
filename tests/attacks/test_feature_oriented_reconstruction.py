"""FORA on digits: it reads smashed data where a decoder of a foreign bottom cannot."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from attacks.feature_oriented_reconstruction import FeatureOrientedReconstruction
from leakbed.contracts import Knowledge, Seat, View
from leakbed.models import Architecture
from leakbed.oracle.metrics import abs_pearson

TARGETS = 64
SHAPE = (1, 6, 6)
LAYERS = Architecture(
    name="tests.support.hijackable:blocks", image_shape=SHAPE, num_classes=3, cut=2
)


def digits() -> Tensor:
    """Without the border, which is nearly empty."""
    whole = torch.from_numpy(load_digits().images).float().div(16)
    return whole[:, None, 1:7, 1:7]


def view(*, bottom: int = 3) -> View:
    images = digits()
    private, public = images[:400], images[400:1200]
    smashed = LAYERS.bottom(bottom)(private).detach()
    return View(
        seat=Seat.SERVER,
        image_shape=SHAPE,
        num_classes=3,
        targets=TARGETS,
        smashed=smashed[:TARGETS],
        round_smashed=smashed,
        architecture=LAYERS,
        public_images=public,
        device=torch.device("cpu"),
    )


def read(shown: View, **settings: Any) -> float:
    """Return the mean absolute correlation of guess and truth."""
    guess = FeatureOrientedReconstruction(**{"steps": 120} | settings).run(shown, seed=1)
    assert guess.images is not None
    return float(abs_pearson(guess.images[:, 0], digits()[:TARGETS]).mean())


def test_it_reads_digits_and_neither_a_foreign_simulator_nor_foreign_rows_do() -> None:
    shown = view()
    assert shown.round_smashed is not None
    found = read(shown)
    assert found > read(shown, critic=0.0, mmd=0.0) + 0.1
    other = view(bottom=4)
    swapped = replace(shown, smashed=other.smashed)  # of another model: the negative control
    assert found > read(swapped) + 0.1


def test_it_knows_no_label_and_no_weight() -> None:
    threat = FeatureOrientedReconstruction().threat
    assert threat.needs == {Knowledge.PUBLIC_IMAGES, Knowledge.ARCHITECTURE}
    bare = FeatureOrientedReconstruction(simulator="pilot").threat
    assert bare.needs == {Knowledge.PUBLIC_IMAGES}
    assert not threat.active


@pytest.mark.parametrize("alone", ["critic", "mmd"])
def test_either_term_can_be_left_out(alone: str) -> None:
    other = {"critic": "mmd", "mmd": "critic"}[alone]
    assert read(view(), steps=2, **{other: 0.0}) >= 0
