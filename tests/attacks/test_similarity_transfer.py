"""A party's own inputs, embedded by what public images taught, are grouped by class."""

from dataclasses import replace
from math import nan
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks import ATTACKS
from attacks.similarity_transfer import SimilarityTransfer
from leakbed.contracts import Evidence, Knowledge, MissingKnowledgeError, UnfitViewError, View
from leakbed.oracle.metrics import best_named
from tests.support.labelled_views import accuracy, known, view_of, within_chance

CLASSES = 3
LEARNS: dict[str, Any] = {"epochs": 10, "batch_size": 10, "rate": 3e-3}


def shapes(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return bars, blobs and edges, faint on one of three bright grounds, and which each is.

    Pixels and fresh features are alike where grounds are; only what has learned tells shapes apart.
    """
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    masks = torch.zeros(CLASSES, 1, 8, 8)
    masks[0, :, :, 3:5] = 1
    masks[1, :, 2:6, 2:6] = 1
    masks[2, :, [0, 7]] = 1
    grounds = torch.zeros(3, 1, 8, 8)
    grounds[0, :, :4], grounds[1, :, 4:], grounds[2, :, :, :4] = 1, 1, 1
    ground = grounds[torch.randint(3, (count,), generator=stream)]
    noise = torch.rand(count, 1, 8, 8, generator=stream)
    return 0.1 * noise + 0.6 * ground + 0.25 * masks[labels], labels


def view(*, first: int = CLASSES, **changes: Any) -> tuple[View, Tensor]:
    own, labels = shapes(90, seed=1)
    public, public_labels = shapes(120, seed=2)
    granted = {"own_images": own, "public_images": public, "public_labels": public_labels} | changes
    made = view_of(
        own, known(labels, first=first), cut_gradient=None, num_classes=CLASSES, **granted
    )
    object.__setattr__(made, "image_shape", (1, 8, 8))
    return made, labels


@pytest.mark.parametrize("by", ["clustering", "distance"])
def test_public_images_teach_to_tell_its_own_apart(by: str) -> None:
    made, labels = view()
    guess = SimilarityTransfer(by=by, **LEARNS).run(made, seed=0)
    assert accuracy(guess.labels, labels, known_rows=CLASSES) > 0.8
    untaught = SimilarityTransfer(by=by, rate=1e-12, epochs=1).run(made, seed=0)
    assert accuracy(untaught.labels, labels, known_rows=CLASSES) < 0.5


def test_without_a_known_label_it_groups_them() -> None:
    made, labels = view(first=0)
    clusters = SimilarityTransfer(**LEARNS).run(made, seed=0).clusters
    assert clusters is not None
    assert best_named(clusters, labels[:, None]).double().mean() > 0.8


def test_the_inputs_of_others_say_nothing() -> None:
    own, _ = shapes(90, seed=1)
    other = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    made, labels = view(own_images=own[other])
    guess = SimilarityTransfer(**LEARNS).run(made, seed=0)
    assert within_chance(guess.labels, labels, known_rows=CLASSES)


def test_it_reads_no_message() -> None:
    threat = SimilarityTransfer().threat
    assert threat.evidence == {Evidence.NOTHING}
    assert Knowledge.OWN_IMAGES in threat.needs
    assert ATTACKS["similarity-transfer"] is SimilarityTransfer


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("own_images", "only a feature party"),
        ("public_images", "a public share"),
        ("public_labels", "trains on public labels"),
    ],
)
def test_what_is_missing_is_named(missing: str, told: str) -> None:
    made, _ = view(**{missing: None})
    with pytest.raises(MissingKnowledgeError, match=told):
        SimilarityTransfer().run(made, seed=0)


def test_inputs_too_small_for_its_network_are_refused() -> None:
    made, _ = view()
    with pytest.raises(UnfitViewError, match="these inputs are 3x10, under 4x4"):
        SimilarityTransfer().run(replace(made, image_shape=(1, 3, 10)), seed=0)


@pytest.mark.parametrize(
    "settings", [{"by": "clusters"}, {"epochs": 0}, {"rate": 0.0}, {"rate": nan}]
)
def test_illegal_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'clustering'|must all be positive"):
        SimilarityTransfer(**settings)
