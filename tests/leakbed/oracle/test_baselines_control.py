"""The control passes for guesses that know nothing of the truth and fails for those that do."""

from dataclasses import replace

import pytest
import torch

from leakbed.contracts import Guess
from leakbed.contracts.attributes import attribute_of
from leakbed.oracle import Truth, baselines, control_verdict, score


@pytest.mark.parametrize("seed", range(5))
def test_random_guesses_pass(truth: Truth, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    guess = Guess(
        images=torch.rand(truth.images.shape, generator=drawn),
        labels=torch.randint(0, 10, truth.labels.shape, generator=drawn),
    )
    verdict = control_verdict(score(guess, truth.deranged()), baselines(truth))
    assert verdict["within"] is True
    assert set(verdict["scores"]) == {"identification", "abs_pearson", "ssim", "label_accuracy"}


def test_a_perfect_attack_passes_on_unrelated_truth_and_fails_on_its_own(truth: Truth) -> None:
    guess, beside = Guess(images=truth.images, labels=truth.labels), baselines(truth)
    assert control_verdict(score(guess, truth.deranged()), beside)["within"] is True
    verdict = control_verdict(score(guess, truth), beside)
    assert verdict["within"] is False
    assert verdict["above"] == ["identification", "abs_pearson", "ssim", "label_accuracy"]


def test_batches_are_judged_like_single_rows(batches: Truth) -> None:
    guess, beside = Guess(images=batches.images, labels=batches.labels), baselines(batches)
    assert control_verdict(score(guess, batches.deranged()), beside)["within"] is True
    assert control_verdict(score(guess, batches), beside)["within"] is False


def test_a_partial_leak_is_seen(truth: Truth) -> None:
    images = truth.deranged().images.clone()
    images[:8] = truth.images[:8]  # half of the guesses know their truth
    verdict = control_verdict(score(Guess(images=images), truth), baselines(truth))
    assert "identification" in verdict["above"]


def test_the_limit_is_two_standard_errors_above_the_best_baseline(truth: Truth) -> None:
    beside = baselines(truth)
    control = score(Guess(images=truth.images), truth.deranged())
    limit = control_verdict(control, beside)["baseline"]["ssim"]
    strongest = beside[limit["name"]].metrics["ssim"]
    spread = (control.metrics["ssim"].stderr or 0) ** 2 + (strongest.stderr or 0) ** 2
    assert limit["value"] == strongest.mean
    assert limit["limit"] == pytest.approx(strongest.mean + 2 * spread**0.5)


def test_a_single_target_cannot_be_judged(truth: Truth) -> None:
    single = replace(
        truth, images=truth.images[:1], labels=truth.labels[:1], positions=truth.positions[:1]
    )
    found = control_verdict(score(Guess(images=single.images), single), baselines(single))
    assert found == {"within": None, "scores": {}, "baseline": {}, "above": []}


def test_an_attribute_that_is_told_from_other_rows_is_seen(truth: Truth) -> None:
    asked = replace(truth, attribute=attribute_of("label", tuple(map(str, range(10)))))
    beside = baselines(asked)
    honest = control_verdict(score(Guess(attributes=truth.labels), asked.deranged()), beside)
    assert honest["within"] is True
    leaked = Guess(attributes=asked.deranged().labels)
    assert control_verdict(score(leaked, asked.deranged()), beside)["above"] == [
        "attribute_accuracy"
    ]


def test_a_baseline_that_looks_at_the_samples_does_not_widen_the_limit(truth: Truth) -> None:
    leaked = Guess(labels=truth.deranged().labels)  # of the very samples it is held against
    beside = {"own-inputs-classifier": Guess(labels=truth.labels)}
    found = baselines(truth, unordered_labels=True, beside=beside)
    verdict = control_verdict(score(leaked, truth.deranged()), found)
    assert verdict["within"] is False
    assert verdict["baseline"]["label_accuracy"]["name"] != "own-inputs-classifier"
