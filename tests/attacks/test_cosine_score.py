"""The cosine score: one known gradient tells the two labels apart, from the first step on."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cosine_similarity

from attacks.cosine_score import CosineScore
from leakbed.contracts import (
    Attack,
    Evidence,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    UnfitViewError,
)
from tests.support.cut_runs import first_known, rare_run


@pytest.mark.parametrize("steps", [0, 30])
def test_one_known_sample_tells_all_labels(steps: int) -> None:
    for stream in range(3):
        view, labels = rare_run(stream, steps=steps)
        guess = CosineScore().run(view, seed=0)
        assert roc_auc_score(labels, guess.scores[:, 0]) > 0.98
        assert (guess.labels[:, 0] == labels).float().mean() > 0.97


def test_the_score_is_the_mean_cosine_with_the_known_positives() -> None:
    view, labels = rare_run(4)
    view = replace(view, known_labels=first_known(labels, 3))
    guess = CosineScore().run(view, seed=0)
    known = view.cut_gradient[(view.known_labels[:, 0] == 1)]
    assert len(known) == 3
    slow = [cosine_similarity(row[None], known, dim=1).mean() for row in view.cut_gradient]
    assert torch.allclose(guess.scores[:, 0], torch.stack(slow), atol=1e-6)


@pytest.mark.parametrize("steps", [0, 30])
def test_the_rarer_side_needs_no_known_label(steps: int) -> None:
    attack = CosineScore(reference="rarer")
    for stream in range(3):
        view, labels = rare_run(stream, steps=steps)
        guess = attack.run(replace(view, known_labels=None), seed=0)
        assert roc_auc_score(labels, guess.scores[:, 0]) > 0.98


def test_what_points_nowhere_is_on_no_side() -> None:
    rows = torch.zeros(10, 4)
    rows[:3, 0], rows[3, 0] = 1.0, -1.0
    rows[4:7] = torch.nan
    view = replace(rare_run(0)[0], cut_gradient=rows, targets=10, known_labels=None)
    guess = CosineScore(reference="rarer").run(view, seed=0)
    assert guess.labels[:4, 0].tolist() == [0, 0, 0, 1]


def test_of_a_label_that_is_not_rare_the_rarer_side_is_the_wrong_one() -> None:
    view, labels = rare_run(0)
    swapped = replace(view, cut_gradient=-view.cut_gradient)  # as if label 0 were the rare one
    guess = CosineScore(reference="rarer").run(swapped, seed=0)
    assert roc_auc_score(labels, guess.scores[:, 0]) > 0.98  # it says "rare", which now is label 0


def test_unrelated_gradients_are_chance() -> None:
    view, labels = rare_run(0)
    drawn, areas = torch.Generator().manual_seed(1), []
    for _ in range(30):
        shuffled = view.cut_gradient[torch.randperm(len(labels), generator=drawn)]
        guess = CosineScore().run(replace(view, cut_gradient=shuffled), seed=0)
        areas.append(roc_auc_score(labels, guess.scores[:, 0]))
    assert abs(sum(areas) / 30 - 0.5) < 0.023  # two errors: 0.062 each at 24 of 240


def test_gradients_that_are_not_finite_fail_alone_and_zeros_say_nothing() -> None:
    view, _ = rare_run(2)
    poisoned = view.cut_gradient.clone()
    first = int((view.known_labels[:, 0] < 0).nonzero()[0])
    poisoned[first], poisoned[first + 1] = torch.inf, 0.0
    for attack in (CosineScore(), CosineScore(reference="rarer")):
        guess = attack.run(replace(view, cut_gradient=poisoned), seed=0)
        assert guess.failed.nonzero().tolist() == [[first]]
        assert guess.scores[first].isnan()
        assert guess.scores[first + 2 :].isfinite().all()


def test_the_threat_follows_the_settings() -> None:
    assert isinstance(CosineScore(), Attack)
    assert CosineScore().threat.needs == {Knowledge.KNOWN_LABELS}
    assert not CosineScore(reference="rarer").threat.needs
    assert CosineScore().threat.evidence == {Evidence.CUT_GRADIENT}
    assert CosineScore(seat="server").threat.seat == Seat.SERVER


def test_what_does_not_fit_is_said() -> None:
    view, _ = rare_run(3, steps=0)
    unknown = torch.full((view.targets, 1), -1)
    for known in (None, unknown, torch.where(view.known_labels == 1, -1, view.known_labels)):
        with pytest.raises(MissingKnowledgeError, match="known_per_class"):
            CosineScore().run(replace(view, known_labels=known), seed=0)
    poisoned = torch.full_like(view.cut_gradient, torch.nan)
    with pytest.raises(MissingKnowledgeError, match="known to have label 1"):
        CosineScore().run(replace(view, cut_gradient=poisoned), seed=0)
    with pytest.raises(MissingKnowledgeError, match="cosine-score reads the gradient"):
        CosineScore().run(replace(view, cut_gradient=None), seed=0)
    with pytest.raises(UnfitViewError, match="here are 10 classes"):
        CosineScore().run(replace(view, num_classes=10), seed=0)
    one = replace(view, targets=1, cut_gradient=view.cut_gradient[:1])
    with pytest.raises(UnfitViewError, match="fewer than two that point anywhere"):
        CosineScore(reference="rarer").run(one, seed=0)
    with pytest.raises(ValueError, match="unknown reference"):
        CosineScore(reference="some")
    with pytest.raises(ValueError, match="did you mean 'client'"):
        CosineScore(seat="clint")
