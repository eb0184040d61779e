"""The nearest known sample names every other."""

import pytest
import torch
from torch.nn.functional import normalize

from attacks import ATTACKS
from attacks.similarity_distance import SimilarityDistance
from leakbed.contracts import Evidence, Knowledge, MissingKnowledgeError, Seat
from tests.support.labelled_views import CLASSES, accuracy, known, planted, view_of, within_chance


def test_directions_that_are_labels_are_read() -> None:
    rows, labels = planted()
    guess = SimilarityDistance().run(view_of(rows, known(labels)), seed=0)
    assert accuracy(guess.labels, labels) == 1
    assert guess.objective is not None
    assert guess.objective[:CLASSES].max() < 1e-3, "a known sample is its own neighbour"


def test_it_is_the_literal_nearest_neighbour() -> None:
    rows, labels = planted(60, noise=2.0)
    view = view_of(rows, known(labels, first=10))
    guess = SimilarityDistance().run(view, seed=0)
    assert guess.labels is not None
    unit = normalize(rows.double(), dim=1)
    for row in range(len(rows)):
        similar = [float(unit[row] @ unit[other]) for other in range(10)]
        best = max(range(10), key=lambda other: similar[other])
        assert int(guess.labels[row]) == int(labels[best])


def test_places_of_smashed_data_are_read() -> None:
    stream = torch.Generator().manual_seed(4)
    labels = torch.arange(100) % CLASSES
    blobs = labels[:, None] * torch.ones(1, 8) + 0.05 * torch.randn(100, 8, generator=stream)
    view = view_of(blobs, known(labels), smashed=blobs)
    attack = SimilarityDistance(evidence="smashed")
    assert accuracy(attack.run(view, seed=0).labels, labels) == 1
    unified = SimilarityDistance(evidence="smashed", unified=True)
    assert accuracy(unified.run(view, seed=0).labels, labels) < 0.9, "their lengths are the labels"


@pytest.mark.parametrize("reduction", ["random-projection", "svd"])
def test_wide_rows_are_read_through_a_narrow_projection(reduction: str) -> None:
    rows, labels = planted(width=900)
    attack = SimilarityDistance(reduction=reduction, width=64)
    assert accuracy(attack.run(view_of(rows, known(labels)), seed=0).labels, labels) == 1


def test_shuffled_evidence_says_nothing() -> None:
    rows, labels = planted()
    other = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    guess = SimilarityDistance().run(view_of(rows[other], known(labels)), seed=0)
    assert within_chance(guess.labels, labels)


def test_a_row_that_is_no_number_has_failed_and_the_others_have_not() -> None:
    rows, labels = planted()
    rows[9] = torch.inf
    guess = SimilarityDistance().run(view_of(rows, known(labels)), seed=0)
    assert guess.failed is not None
    assert guess.failed.nonzero().flatten().tolist() == [9]
    labels[9] = 0
    assert accuracy(guess.labels, labels) == 1


def test_without_a_known_label_there_is_nobody_to_be_near_to() -> None:
    rows, labels = planted(20)
    with pytest.raises(MissingKnowledgeError, match="use 'similarity-clustering'"):
        SimilarityDistance().run(view_of(rows, known(labels, first=0)), seed=0)


def test_the_threat_model_follows_the_settings() -> None:
    threat = SimilarityDistance(seat="server", evidence="smashed").threat
    assert (threat.seat, threat.evidence) == (Seat.SERVER, {Evidence.SMASHED})
    assert threat.needs == {Knowledge.KNOWN_LABELS}
    assert ATTACKS["similarity-distance"] is SimilarityDistance
