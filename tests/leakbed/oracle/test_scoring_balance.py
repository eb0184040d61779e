"""Balanced accuracy: every label counts alike, its error covers, guessing gets one over labels."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from leakbed.contracts import Guess
from leakbed.oracle import Truth, baselines, control_verdict, score
from leakbed.oracle.scoring import balanced_accuracy, balanced_chance, by_label


def labels_of(*counts: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]


def test_it_is_scikit_learns_mean_recall() -> None:
    stream = torch.Generator().manual_seed(0)
    for _ in range(10):
        labels, guess = (torch.randint(4, (60, 1), generator=stream) for _ in range(2))
        found = balanced_accuracy(guess == labels, labels)
        assert found is not None
        assert found.mean == pytest.approx(balanced_accuracy_score(labels, guess))
        assert len(found.values) == 60


def test_the_commonest_label_is_worth_no_more_than_any_other() -> None:
    labels = labels_of(90, 10)
    for guess in (0, 1):
        found = balanced_accuracy(labels == guess, labels)
        assert found is not None
        assert found.mean == pytest.approx(0.5)


def test_the_error_covers_what_repetition_spreads_to() -> None:
    labels = labels_of(180, 20)
    stream = torch.Generator().manual_seed(1)
    odds = torch.tensor([0.8, 0.4])[labels]
    runs = [
        balanced_accuracy(torch.rand(200, 1, generator=stream) < odds, labels) for _ in range(400)
    ]
    means = torch.tensor([run.mean for run in runs if run])
    errors = torch.tensor([run.stderr for run in runs if run])
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.1)


def test_targets_are_clusters() -> None:
    labels = torch.tensor([[0, 1] * 8] * 20)
    right = (torch.arange(20) % 2 == 0)[:, None].expand(20, 16)
    found = balanced_accuracy(right, labels)
    assert found is not None
    assert found.stderr == pytest.approx(0.5 / 19**0.5, rel=0.01)  # not of 320 samples


def test_all_right_still_has_an_error_and_a_single_target_none() -> None:
    labels = labels_of(30, 2)
    found = balanced_accuracy(labels >= 0, labels)
    assert found is not None
    assert found.mean == 1
    assert found.stderr is not None
    assert 0.05 < found.stderr < 0.3
    alone = balanced_accuracy(labels.T >= 0, labels.T)
    assert alone is not None
    assert alone.stderr is None


def test_one_label_alone_has_no_balance() -> None:
    labels = labels_of(5)
    assert balanced_accuracy(labels >= 0, labels) is None
    assert balanced_chance(labels, unordered=False) is None


def test_baselines_have_it_and_neither_skill_nor_control_do(truth: Truth) -> None:
    skewed = replace(truth, labels=(torch.arange(16)[:, None] < 2).long(), num_classes=2)
    found = baselines(skewed)
    assert found["majority-label"].means()["label_accuracy"] == 0.875
    for name in ("majority-label", "chance"):
        assert found[name].means()["balanced_accuracy"] == pytest.approx(0.5)
    guess = Guess(labels=skewed.labels)
    scores = score(guess, skewed, baselines=found)
    assert scores.means()["balanced_accuracy"] == 1
    assert "balanced_accuracy_skill" not in scores.metrics
    control = control_verdict(score(guess, skewed.deranged()), found)
    assert "balanced_accuracy" not in control["scores"]
    assert all("balanced_accuracy" not in means for means in by_label(scores, skewed).values())


def test_what_was_given_up_is_wrong() -> None:
    labels = labels_of(4, 4)
    images = torch.rand(8, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = Truth(
        images=images,
        labels=labels,
        num_classes=2,
        candidates=images[:, 0],
        positions=torch.arange(8)[:, None],
    )
    found = score(Guess(labels=labels, failed=torch.arange(8) < 4), truth)
    assert found.means()["balanced_accuracy"] == 0.5
