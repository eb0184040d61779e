"""Clusters are scored under the best naming, and so is what knows nothing."""

from itertools import permutations

import pytest
import torch

from leakbed.contracts import Guess
from leakbed.oracle import Truth, baselines, control_verdict, score
from leakbed.oracle.metrics import best_named
from leakbed.oracle.truth import GuessShapeError


def truth_of(labels: list[int], classes: int) -> Truth:
    count = len(labels)
    images = torch.rand(count, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Truth(
        images=images,
        labels=torch.tensor(labels)[:, None],
        num_classes=classes,
        candidates=images[:, 0],
        positions=torch.arange(count)[:, None],
        public_labels=torch.tensor([0]),
    )


def test_the_best_naming_is_that_of_a_search_through_all() -> None:
    stream = torch.Generator().manual_seed(3)
    for _ in range(20):
        clusters, labels = (torch.randint(4, (30, 1), generator=stream) for _ in range(2))
        best = max(
            int((torch.tensor(names)[clusters] == labels).sum()) for names in permutations(range(4))
        )
        assert int(best_named(clusters, labels).sum()) == best


def test_a_relabelling_is_perfect_and_a_cluster_too_many_has_no_name() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])[:, None]
    assert best_named((labels + 5) * 7, labels).all()
    split = torch.tensor([0, 9, 1, 1, 2, 2])[:, None]
    assert best_named(split, labels).flatten().tolist() in (
        [True, False, True, True, True, True],
        [False, True, True, True, True, True],
    )
    merged = torch.tensor([0, 0, 0, 0, 2, 2])[:, None]
    assert int(best_named(merged, labels).sum()) == 4


def test_what_broke_down_counts_as_wrong() -> None:
    truth = truth_of([0, 1, 0, 1], 2)
    failed = torch.tensor([True, False, False, False])
    scores = score(Guess(clusters=1 - truth.labels, failed=failed), truth)
    assert scores.metrics["cluster_accuracy"].mean == 0.75
    assert scores.failures == 1


def test_baselines_of_clusters_are_named_as_well_and_bound_the_control() -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    truth = truth_of((order % 3).tolist(), 3)
    found = baselines(truth, unordered_labels=True, clusters=True)
    assert found["majority-label"].metrics["cluster_accuracy"].mean == pytest.approx(1 / 3)
    noise = torch.randint(3, (300, 1), generator=torch.Generator().manual_seed(1))
    assert score(Guess(clusters=noise), truth).metrics["cluster_accuracy"].mean > 1 / 3
    guess = Guess(clusters=2 - truth.labels)
    own = score(guess, truth, baselines=found)
    assert own.metrics["cluster_accuracy"].mean == 1
    assert own.metrics["cluster_accuracy_skill"].mean == 1
    assert "cluster_accuracy" in control_verdict(score(guess, truth.deranged()), found)["scores"]


def test_images_are_not_scored_beside_labels() -> None:
    found = baselines(truth_of([0, 1, 2, 1], 3), unordered_labels=True)
    assert "constant" not in found
    assert found["another-row"].metrics.keys() == {"label_accuracy", "balanced_accuracy"}
    assert found["chance"].metrics["label_accuracy"].mean == pytest.approx(1 / 3)


def test_clusters_of_other_targets_are_refused() -> None:
    with pytest.raises(GuessShapeError, match="clusters"):
        score(Guess(clusters=torch.zeros(3, 1, dtype=torch.int64)), truth_of([0, 1], 2))


def test_failures_have_no_vote_on_the_names() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, *[1] * 8])
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, *[0] * 8])
    failed = torch.arange(14) >= 6
    truth = truth_of(labels.tolist(), classes=2)
    scores = score(Guess(clusters=clusters[:, None], failed=failed), truth)
    assert scores.metrics["cluster_accuracy"].values[:6] == (1.0,) * 6
