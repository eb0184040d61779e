"""The leak AUC is scikit-learn's, its error DeLong's, and failures know nothing."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from leakbed.contracts import Guess
from leakbed.oracle import (
    GuessShapeError,
    Truth,
    baselines,
    control_verdict,
    leak_auc,
    ranked,
    score,
    unranked,
)

COUNT = 60


def binary(*, positives: int, rows: int = 1) -> Truth:
    stream = torch.Generator().manual_seed(4)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    labels[torch.randperm(COUNT, generator=stream)[:positives]] = 1
    return Truth.among(
        torch.rand(COUNT, 1, 3, 4, generator=stream),
        labels,
        rows=torch.arange(COUNT).view(-1, rows),
        num_classes=2,
        stream=1,
    )


def noisy(truth: Truth, *, worth: float) -> Tensor:
    noise = torch.randn(truth.labels.shape, generator=torch.Generator().manual_seed(5))
    return (noise + worth * truth.labels).round(decimals=1)  # rounded: some are ties


@pytest.mark.parametrize("worth", [0.0, 1.0, -2.0])
def test_it_is_scikit_learns_whatever_the_ties(worth: float) -> None:
    truth = binary(positives=12)
    scores = noisy(truth, worth=worth)
    found = score(Guess(scores=scores), truth).means()["leak_auc"]
    assert found == pytest.approx(roc_auc_score(truth.labels[:, 0], scores[:, 0]))


def test_its_error_is_that_of_repeated_draws() -> None:
    drawn = torch.Generator().manual_seed(6)
    labels, found = (torch.arange(COUNT) < 10).long(), []
    everyone = torch.ones(COUNT, dtype=torch.bool)
    for _ in range(300):
        scores = torch.randn(COUNT, generator=drawn) + labels
        found.append(leak_auc(scores, labels, usable=everyone))
    areas = torch.tensor([each.mean for each in found])
    errors = torch.tensor([each.stderr for each in found])
    assert errors.square().mean().sqrt() == pytest.approx(areas.std().item(), rel=0.15)


@pytest.mark.parametrize("count", [20, 60])
def test_its_error_is_delongs_by_the_books_formula(count: int) -> None:
    drawn = torch.Generator().manual_seed(7)
    labels = (torch.arange(count) < count // 3).long()
    scores = (torch.randn(count, generator=drawn) + labels).round(decimals=1)  # with ties
    found = leak_auc(scores, labels, usable=torch.ones(count, dtype=torch.bool))
    higher, lower = scores[labels == 1].double(), scores[labels == 0].double()
    won = (higher[:, None] > lower).double() + 0.5 * (higher[:, None] == lower).double()
    variance = won.mean(1).var() / len(higher) + won.mean(0).var() / len(lower)
    assert found.mean == pytest.approx(won.mean().item())
    assert found.stderr == pytest.approx(variance.sqrt().item())


def test_a_failed_sample_ties_with_every_other() -> None:
    truth = binary(positives=12)
    scores = 1.0 * truth.labels
    scores[3], failed = torch.nan, torch.zeros(COUNT, dtype=torch.bool)
    failed[7] = True
    found = score(Guess(scores=scores, failed=failed), truth)
    assert found.failures == 2
    slow = [
        0.5 if {i, j} & {3, 7} else 1.0
        for i in range(COUNT)
        for j in range(COUNT)
        if truth.labels[i, 0] > truth.labels[j, 0]
    ]
    assert found.means()["leak_auc"] == pytest.approx(sum(slow) / len(slow))


def test_chance_is_half_and_skill_starts_there() -> None:
    truth = binary(positives=12)
    found = baselines(truth)
    assert found["chance"].means()["leak_auc"] == 0.5
    perfect = score(Guess(scores=1.0 * truth.labels), truth, baselines=found).means()
    assert perfect == {"leak_auc": 1.0, "leak_auc_skill": 1.0}


def test_the_control_scores_unrelated_labels() -> None:
    truth = binary(positives=12)
    found = baselines(truth)
    scores = noisy(truth, worth=9.0)
    honest = control_verdict(score(Guess(scores=scores), truth.deranged()), found)
    assert honest["within"]
    cheating = control_verdict(score(Guess(scores=scores), truth), found)
    assert cheating["above"] == ["leak_auc"]


@pytest.mark.parametrize("positives", [0, 1, COUNT])
def test_one_label_alone_has_no_leak_auc(positives: int) -> None:
    truth = binary(positives=positives)
    assert not ranked(truth)
    assert not score(Guess(scores=1.0 * truth.labels), truth).metrics
    assert "leak_auc" not in baselines(truth)["chance"].means()
    (reason,) = unranked(Guess(scores=1.0 * truth.labels), truth)
    assert f"[{COUNT - positives}, {positives}] by label" in reason
    assert not unranked(Guess(labels=truth.labels), truth)
    assert not unranked(Guess(scores=1.0 * truth.labels), binary(positives=12))


def test_neither_have_batches_nor_many_classes(truth: Truth) -> None:
    assert not ranked(binary(positives=12, rows=2))
    assert not ranked(truth)
    assert not score(Guess(scores=1.0 * truth.labels), truth).metrics
    assert not ranked(replace(binary(positives=12), num_classes=3))


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(GuessShapeError, match="scores have shape"):
        score(Guess(scores=torch.zeros(COUNT - 1, 1)), binary(positives=12))
