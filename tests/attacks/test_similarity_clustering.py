"""Clusters are classes, and known samples name them."""

import pytest
import torch

from attacks.building_blocks.similarity import LabelledRows
from attacks.similarity_clustering import SimilarityClustering, named
from leakbed.contracts import UnfitViewError
from leakbed.oracle.metrics import best_named
from tests.support.labelled_views import CLASSES, accuracy, known, planted, view_of, within_chance


def test_directions_that_are_labels_are_read() -> None:
    rows, labels = planted()
    guess = SimilarityClustering().run(view_of(rows, known(labels)), seed=0)
    assert accuracy(guess.labels, labels) == 1
    assert guess.clusters is None


def test_without_a_known_label_it_says_which_samples_share_one() -> None:
    rows, labels = planted()
    guess = SimilarityClustering().run(view_of(rows, known(labels, first=0)), seed=0)
    assert guess.labels is None
    assert guess.clusters is not None
    assert best_named(guess.clusters, labels[:, None]).all()


@pytest.mark.parametrize("start", ["k-means++", "known"])
def test_mini_batches_find_them_too(start: str) -> None:
    rows, labels = planted(1000)
    attack = SimilarityClustering(mini_batch_above=500, start=start)
    assert accuracy(attack.run(view_of(rows, known(labels)), seed=0).labels, labels) == 1


def test_smashed_data_are_grouped_from_the_known_samples_on() -> None:
    rows, labels = planted(noise=0.3)
    rows = rows / rows.norm(dim=1, keepdim=True)
    view = view_of(rows, known(labels), smashed=rows)
    attack = SimilarityClustering(evidence="smashed")
    assert accuracy(attack.run(view, seed=0).labels, labels) > 0.95


def rows_and_centres(known_labels: list[int]) -> tuple[LabelledRows, torch.Tensor]:
    """Three clusters on a line at 0, 10 and 20; known rows lie at 0, 1, 11."""
    places = torch.tensor([0.0, 1.0, 11.0, 20.0])[:, None]
    labels = torch.tensor(known_labels)
    every = torch.ones(4, dtype=torch.bool)
    found = LabelledRows(rows=places, usable=every, known=torch.arange(len(labels)), labels=labels)
    return found, torch.tensor([[0.0], [10.0], [20.0]])


def test_two_known_samples_in_one_cluster_leave_another_to_the_nearest() -> None:
    found, centres = rows_and_centres([0, 1, 2])
    places = torch.tensor([0, 0, 1, 2])
    names = named(places, centres, found, fill=False)
    assert sorted(names[:2].tolist()) in ([0, 2], [1, 2])
    assert names.tolist()[1:] == [2, -1]
    assert named(places, centres, found, fill=True).tolist()[1:] == [2, 2]


def test_a_label_names_the_cluster_that_holds_most_of_it() -> None:
    found, centres = rows_and_centres([0, 1, 1])
    assert named(torch.tensor([0, 1, 1, 2]), centres, found, fill=False).tolist() == [0, 1, -1]


def test_published_naming_draws_a_label_for_every_sample_of_an_unnamed_cluster() -> None:
    rows, labels = planted(400)
    view = view_of(rows, known(labels, first=1))
    settings = {"partial": True, "clusters": CLASSES}
    drawn = SimilarityClustering(unmatched="random", **settings).run(view, seed=0).labels  # type: ignore[arg-type]
    assert drawn is not None
    others = labels != labels[0]
    assert (drawn.flatten()[~others] == labels[0]).all()
    assert len(drawn.flatten()[others].unique()) == CLASSES
    near = SimilarityClustering(**settings).run(view, seed=0).labels  # type: ignore[arg-type]
    assert near is not None
    assert (near == labels[0]).all()


def test_shuffled_evidence_says_nothing() -> None:
    rows, labels = planted()
    other = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    guess = SimilarityClustering().run(view_of(rows[other], known(labels)), seed=0)
    assert within_chance(guess.labels, labels)


def test_the_same_seed_gives_the_same_bits_whatever_the_threads() -> None:
    rows, labels = planted(noise=3.0)
    view = view_of(rows, known(labels))
    first, again = (SimilarityClustering().run(view, seed=5) for _ in range(2))
    assert torch.equal(first.labels, again.labels)  # type: ignore[arg-type]
    assert torch.equal(first.objective, again.objective)  # type: ignore[arg-type]


def test_more_clusters_than_samples_are_refused() -> None:
    rows, labels = planted(CLASSES + 1)
    attack = SimilarityClustering(clusters=9)
    with pytest.raises(UnfitViewError, match="6 usable samples cannot make 9 clusters"):
        attack.run(view_of(rows, known(labels)), seed=0)
    attack = SimilarityClustering(clusters=4, start="known")
    with pytest.raises(UnfitViewError, match="5 are known and 4 clusters wanted"):
        attack.run(view_of(rows, known(labels)), seed=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"start": "kmeans++"}, "did you mean 'k-means\\+\\+'"),
        ({"unmatched": "randm"}, "did you mean 'random'"),
        ({"clusters": 0}, "clusters is 0"),
        ({"mini_batch_above": -1}, "mini_batch_above is -1"),
        ({"seat": "clinet"}, "did you mean 'client'"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SimilarityClustering(**settings)  # type: ignore[arg-type]
