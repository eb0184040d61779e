"""The norm score: lengths rank rare labels once a network knows that they are rare."""

from dataclasses import replace

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score

from attacks.norm_score import NormScore
from leakbed.contracts import Attack, Evidence, MissingKnowledgeError, Seat, UnfitViewError
from tests.support.cut_runs import RARE, rare_run


def test_rare_labels_have_long_gradients() -> None:
    areas = []
    for stream in range(3):
        view, labels = rare_run(stream)
        guess = NormScore().run(view, seed=0)
        assert torch.equal(guess.scores[:, 0], view.cut_gradient.norm(dim=1))
        areas.append(roc_auc_score(labels, guess.scores[:, 0]))
        found = (guess.labels[:, 0] == labels).float().mean()
        assert found > 1 - RARE / len(labels) + 0.05  # better than guessing label 0 everywhere
    assert min(areas) > 0.95


def test_before_a_label_is_known_to_be_rare_lengths_say_little() -> None:
    areas = []
    for stream in range(4):
        view, labels = rare_run(stream, steps=0)
        areas.append(roc_auc_score(labels, NormScore().run(view, seed=0).scores[:, 0]))
    trained, labels = rare_run(0)
    assert max(areas) < roc_auc_score(labels, NormScore().run(trained, seed=0).scores[:, 0])


def test_unrelated_gradients_are_chance() -> None:
    view, labels = rare_run(0)
    drawn, areas = torch.Generator().manual_seed(1), []
    for _ in range(30):
        shuffled = view.cut_gradient[torch.randperm(len(labels), generator=drawn)]
        guess = NormScore().run(replace(view, cut_gradient=shuffled), seed=0)
        areas.append(roc_auc_score(labels, guess.scores[:, 0]))
    assert abs(sum(areas) / 30 - 0.5) < 0.023  # two errors: 0.062 each at 24 of 240


def test_the_threshold_is_two_means_of_logarithms() -> None:
    view, _ = rare_run(1, steps=15)
    guess = NormScore().run(view, seed=0)
    logs = guess.scores.log().numpy()
    centres = torch.tensor([[logs.min()], [logs.max()]]).numpy()
    groups = KMeans(2, init=centres, n_init=1, tol=0).fit(logs)
    assert (groups.labels_ == guess.labels[:, 0].numpy()).mean() > 0.99
    spread = [
        sum(float(((part - part.mean()) ** 2).sum()) for part in (logs[own], logs[~own]))
        for own in (groups.labels_ == 1, guess.labels[:, 0].numpy() == 1)
    ]
    assert spread[1] <= spread[0] * (1 + 1e-6)  # the exact optimum, which k-means need not find


def test_of_equal_lengths_none_is_the_longer_one() -> None:
    view, _ = rare_run(2)
    equal = view.cut_gradient / view.cut_gradient.norm(dim=1, keepdim=True)
    assert not NormScore().run(replace(view, cut_gradient=equal), seed=0).labels.any()


def test_a_gradient_that_is_not_finite_fails_alone() -> None:
    view, _ = rare_run(2)
    poisoned = view.cut_gradient.clone()
    poisoned[5] = torch.nan
    poisoned[6] = 0.0
    guess = NormScore().run(replace(view, cut_gradient=poisoned), seed=0)
    assert guess.failed.nonzero().tolist() == [[5]]
    assert guess.labels[5:7, 0].tolist() == [0, 0]
    assert guess.scores[7:].equal(NormScore().run(view, seed=0).scores[7:])
    everything = torch.full_like(poisoned, torch.nan)
    assert NormScore().run(replace(view, cut_gradient=everything), seed=0).failed.all()


def test_the_threat_is_the_party_without_labels() -> None:
    assert isinstance(NormScore(), Attack)
    assert NormScore().threat.seat == Seat.CLIENT
    assert NormScore(seat="server").threat.seat == Seat.SERVER
    assert NormScore().threat.evidence == {Evidence.CUT_GRADIENT}
    assert not NormScore().threat.needs


def test_what_does_not_fit_is_said() -> None:
    view, _ = rare_run(3, steps=0)
    with pytest.raises(MissingKnowledgeError, match=r"protocol\.labels = 'server'"):
        NormScore().run(replace(view, cut_gradient=None), seed=0)
    for classes in (1, 10):
        with pytest.raises(UnfitViewError, match=f"here are {classes} classes.*regression"):
            NormScore().run(replace(view, num_classes=classes), seed=0)
    with pytest.raises(UnfitViewError, match="4 samples stand behind"):
        NormScore().run(replace(view, rows=4), seed=0)
    one = replace(view, targets=1, cut_gradient=view.cut_gradient[:1])
    with pytest.raises(UnfitViewError, match="the view has one"):
        NormScore().run(one, seed=0)
    with pytest.raises(ValueError, match="did you mean 'client'"):
        NormScore(seat="clint")
