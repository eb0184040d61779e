"""A guess is matched, clipped where intensities count, measured, and its failures counted."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from leakbed.contracts import Guess
from leakbed.contracts.attributes import attribute_of
from leakbed.oracle import GuessShapeError, Truth, baselines, score
from leakbed.oracle.metrics import ssim


def test_the_truth_itself_scores_best(truth: Truth) -> None:
    means = score(Guess(images=truth.images, labels=truth.labels), truth).means()
    assert list(means) == [
        "identification",
        "abs_pearson",
        "ssim",
        "label_accuracy",
        "balanced_accuracy",
        "mse",
        "psnr",
        "affine_mse",
    ]
    for name in ("identification", "abs_pearson", "ssim", "label_accuracy"):
        assert means[name] == pytest.approx(1)
    assert means["mse"] == 0


@pytest.mark.parametrize("size", [(1, 28), (28, 1), (10, 10)])
def test_images_under_the_window_of_ssim_are_scored_without_it(size: tuple[int, int]) -> None:
    images = torch.rand(6, 1, *size, generator=torch.Generator().manual_seed(2))
    small = Truth.among(
        images, torch.arange(6) % 2, rows=torch.arange(6)[:, None], num_classes=2, stream=1
    )
    beside = baselines(small)
    found = score(Guess(images=small.images), small, baselines=beside).means()
    assert "ssim" not in found
    assert "ssim_skill" not in found
    assert {"identification", "abs_pearson", "mse", "psnr", "affine_mse"} <= set(found)
    assert all("ssim" not in scores.metrics for scores in beside.values())


def test_rows_in_any_order_score_the_same_and_take_their_labels_along(batches: Truth) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = Guess(images=batches.images[:, order], labels=batches.labels[:, order])
    found = score(shuffled, batches)
    assert found.means()["identification"] == 1
    assert found.means()["label_accuracy"] == 1
    # The labels follow the images: right labels in another order than the images are wrong.
    apart = score(Guess(images=batches.images, labels=batches.labels.roll(1, 1)), batches)
    assert apart.means()["label_accuracy"] == 0
    alone = score(Guess(labels=batches.labels.roll(1, 1)), batches)
    assert alone.means() == {"label_accuracy": 1, "balanced_accuracy": 1}


def test_a_target_is_the_mean_of_its_rows(batches: Truth) -> None:
    guess = batches.images.clone()
    guess[:, 0] = 0.5
    found = score(Guess(images=guess), batches).metrics["identification"]
    assert found.values == pytest.approx([0.8] * 6)
    assert found.interval == pytest.approx((0.6143, 0.9229), abs=1e-3)  # 24 of 30


def test_intensities_are_clipped_where_they_count_and_only_there(truth: Truth) -> None:
    inverted = score(Guess(images=-truth.images), truth).means()
    assert inverted["abs_pearson"] == pytest.approx(1)
    assert inverted["identification"] == 1
    assert inverted["affine_mse"] == pytest.approx(0, abs=1e-9)
    assert inverted["mse"] == pytest.approx(truth.images.square().mean().item(), abs=1e-6)
    black = torch.zeros_like(truth.images)
    assert inverted["ssim"] == pytest.approx(ssim(black[:, 0], truth.images[:, 0]).mean().item())


def test_the_share_of_clipped_pixels_is_told(truth: Truth) -> None:
    assert score(Guess(labels=truth.labels), truth).as_dict().get("clipped") is None
    assert score(Guess(images=truth.images), truth).as_dict()["clipped"] == 0
    images = truth.images.clone()
    images[:4], images[4:8] = 1.5, -0.5
    images[8:] = torch.nan  # no guess: counted as failures instead
    found = score(Guess(images=images), truth)
    assert (found.clipped, found.failures) == (1, 8)
    images[8:] = 0.5
    assert score(Guess(images=images), truth).as_dict()["clipped"] == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_guess_that_is_not_finite_is_a_grey_failure(truth: Truth, value: float) -> None:
    broken, grey = truth.images.clone(), truth.images.clone()
    broken[2, 0, 0, 5, 5] = value
    grey[2] = 0.5
    found, expected = score(Guess(images=broken), truth), score(Guess(images=grey), truth)
    assert found.failures == 1
    assert expected.failures == 0
    assert found.means() == expected.means()
    assert len(found.metrics["ssim"].values) == 16


def test_where_the_attack_gave_up_its_labels_are_wrong_too(truth: Truth) -> None:
    failed = torch.arange(16) < 4
    found = score(Guess(images=truth.images, labels=truth.labels, failed=failed), truth)
    assert found.failures == 4
    assert found.means()["label_accuracy"] == 0.75
    assert found.means()["balanced_accuracy"] < 1
    assert found.means()["identification"] == 0.75


def test_labels_outlive_images_that_are_not_finite(batches: Truth) -> None:
    broken = batches.images.clone()
    broken[0] = float("nan")
    labels = batches.labels.clone()
    labels[0] = labels[0].roll(1)
    found = score(Guess(images=broken, labels=labels), batches)
    assert found.metrics["label_accuracy"].values[0] == 1


def test_skill_is_over_the_best_evidence_free_baseline(truth: Truth) -> None:
    beside = baselines(truth)
    noisy = truth.images + 0.05 * torch.randn(
        truth.images.shape, generator=torch.Generator().manual_seed(0)
    )
    found = score(Guess(images=noisy, labels=truth.labels), truth, baselines=beside).means()
    strongest = max(
        scores.means()["ssim"]
        for name, scores in beside.items()
        if name in {"constant", "public-intensity", "mean-public", "another-row"}
    )
    assert found["ssim_skill"] == pytest.approx((found["ssim"] - strongest) / (1 - strongest))
    assert found["label_accuracy_skill"] == pytest.approx(1)


def test_less_noise_leaks_more_by_every_metric(truth: Truth) -> None:
    noise = torch.randn(truth.images.shape, generator=torch.Generator().manual_seed(0))
    runs = [score(Guess(images=truth.images + s * noise), truth).means() for s in (0.05, 0.3, 3.0)]
    for better, worse in pairwise(runs):
        for name in ("abs_pearson", "ssim", "psnr"):
            assert better[name] > worse[name]
        for name in ("mse", "affine_mse"):
            assert better[name] < worse[name]
        assert better["identification"] >= worse["identification"]


def test_scoring_changes_neither_guess_nor_truth(truth: Truth) -> None:
    images = truth.images * 3 - 1
    kept, true = images.clone(), truth.images.clone()
    score(Guess(images=images), truth)
    assert torch.equal(images, kept)
    assert torch.equal(truth.images, true)


def test_a_guess_of_other_targets_is_refused(truth: Truth) -> None:
    with pytest.raises(GuessShapeError, match="images have shape"):
        score(Guess(images=truth.images[:3]), truth)
    with pytest.raises(GuessShapeError, match="labels have shape"):
        score(Guess(labels=truth.labels[:3]), truth)
    with pytest.raises(GuessShapeError, match="failed have shape"):
        score(Guess(images=truth.images, failed=torch.zeros(3).bool()), truth)


def test_a_guess_of_nothing_has_no_scores(truth: Truth) -> None:
    assert score(Guess(), truth).means() == {}


DIGITS = tuple(str(digit) for digit in range(10))


def test_attributes_are_scored_by_the_labels_they_follow_from(truth: Truth) -> None:
    asked = replace(truth, attribute=attribute_of("parity", DIGITS))
    guess = truth.labels % 2
    assert score(Guess(attributes=guess), asked).means() == {"attribute_accuracy": 1}
    guess[:4] = 1 - guess[:4]
    found = score(Guess(attributes=guess), asked, baselines=baselines(asked))
    assert found.means()["attribute_accuracy"] == 0.75
    low, high = found.metrics["attribute_accuracy"].interval or (0, 0)
    assert 0 < low < 0.75 < high < 1
    assert found.means()["attribute_accuracy_skill"] < 0.75
    failed = replace(Guess(attributes=asked.attributes), failed=torch.arange(16) < 8)
    assert score(failed, asked).means()["attribute_accuracy"] == 0.5


def test_attributes_follow_the_images_or_count_as_a_multiset(batches: Truth) -> None:
    asked = replace(batches, attribute=attribute_of("label", DIGITS))
    rolled = batches.labels.roll(1, 1)
    assert score(Guess(attributes=rolled), asked).means() == {"attribute_accuracy": 1}
    apart = score(Guess(images=batches.images, attributes=rolled), asked)
    assert apart.means()["attribute_accuracy"] == 0


def test_attributes_of_what_nobody_named_are_refused(truth: Truth) -> None:
    with pytest.raises(GuessShapeError, match="the truth names none"):
        score(Guess(attributes=truth.labels), truth)
    asked = replace(truth, attribute=attribute_of("parity", DIGITS))
    with pytest.raises(GuessShapeError, match="attributes have shape"):
        score(Guess(attributes=truth.labels[:3]), asked)
