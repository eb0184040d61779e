import pytest
import torch

from leakbed.contracts import Guess
from leakbed.oracle import Truth, score
from leakbed.oracle.scoring import by_label


def test_each_label_has_the_mean_of_its_own_targets(truth: Truth) -> None:
    labels = truth.labels.flatten()
    known = labels == labels[0]
    images = torch.where(known.reshape(-1, 1, 1, 1, 1), truth.images, 0.5)
    scores = score(Guess(images=images), truth)
    found = by_label(scores, truth)
    assert sorted(found) == sorted(set(labels.tolist()))
    assert found[int(labels[0])]["mse"] == 0
    assert all(found[label]["mse"] > 0 for label in found if label != labels[0])
    counts = torch.bincount(labels)
    total = sum(means["ssim"] * int(counts[label]) for label, means in found.items())
    assert total / len(labels) == pytest.approx(scores.metrics["ssim"].mean)


def test_a_target_of_several_samples_has_no_one_label(batches: Truth) -> None:
    assert by_label(score(Guess(images=batches.images), batches), batches) == {}
