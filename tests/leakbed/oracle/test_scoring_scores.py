"""Means and spreads over targets."""

import json

import pytest
import torch

from leakbed.oracle import Scores, Summary, best_evidence_free, summarise


def scores(**means: float) -> Scores:
    metrics = {
        name: Summary(mean=mean, std=0.0, stderr=0.0, values=(mean, mean))
        for name, mean in means.items()
    }
    return Scores(metrics=metrics, targets=2, rows=1, candidates=10)


def test_a_summary_has_mean_sample_deviation_and_standard_error() -> None:
    found = summarise(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found.mean == 3
    assert found.std == pytest.approx((14 / 3) ** 0.5)
    assert found.stderr == pytest.approx((14 / 3) ** 0.5 / 2)
    assert found.values == (1, 2, 3, 6)


def test_a_single_target_has_no_spread() -> None:
    found = summarise(torch.tensor([0.5]))
    assert (found.mean, found.std, found.stderr) == (0.5, None, None)


def test_the_best_baseline_is_the_one_that_leaks_most_without_the_truth() -> None:
    found = {
        "constant": scores(ssim=0.1, mse=0.09),
        "mean-public": scores(ssim=0.3, mse=0.06),
        "nearest-public": scores(ssim=0.8, mse=0.01),
        "chance": scores(label_accuracy=0.1),
    }
    assert best_evidence_free(found, "ssim") == ("mean-public", 0.3)
    assert best_evidence_free(found, "mse") == ("mean-public", 0.06)
    assert best_evidence_free(found, "label_accuracy") == ("chance", 0.1)
    assert best_evidence_free(found, "psnr") is None


def test_scores_become_plain_json() -> None:
    text = json.dumps(scores(ssim=0.1).as_dict())
    assert json.loads(text)["ssim"]["values"] == [0.1, 0.1]


def test_what_looks_at_the_samples_counts_for_the_skill_and_not_for_the_control() -> None:
    found = {
        "chance": scores(label_accuracy=0.1),
        "own-inputs-classifier": scores(label_accuracy=0.7),
        "untrained-bottom": scores(label_accuracy=0.6),
    }
    assert best_evidence_free(found, "label_accuracy") == ("own-inputs-classifier", 0.7)
    assert best_evidence_free(found, "label_accuracy", blind=True) == ("chance", 0.1)


def test_errors_stand_beside_means_where_they_are_known() -> None:
    one, two = summarise(torch.tensor([0.5])), summarise(torch.tensor([0.0, 1.0]))
    found = Scores(metrics={"ssim": one, "mse": two}, targets=2, rows=1, candidates=2)
    assert found.means_and_errors() == {"ssim": 0.5, "mse": 0.5, "mse_stderr": 0.5}
