"""Every metric against numbers worked out by hand or by another library."""

import math

import numpy as np
import pytest
import torch

from leakbed.metrics import (
    PSNR_CEILING,
    abs_pearson,
    affine_mse,
    binomial_interval,
    correlations,
    identification,
    mse,
    pearson,
    psnr,
    skill,
    ssim,
)


def images(count: int, *, side: int = 12, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_mse_and_psnr_of_an_offset_are_known() -> None:
    truth = images(2) * 0.5
    guess = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(mse(guess, truth).float(), torch.tensor([1e-2, 1e-4]))
    torch.testing.assert_close(psnr(guess, truth).float(), torch.tensor([20.0, 40.0]))


def test_psnr_of_equal_images_is_the_ceiling_and_not_infinite() -> None:
    assert psnr(images(1), images(1)).tolist() == [PSNR_CEILING]


def test_psnr_with_the_published_constants_reads_eleven_decibels_more() -> None:
    # DLM's code takes 1 / (CIFAR-100 channel std) as the peak of images in [0, 1].
    deviations = np.array([0.2673, 0.2564, 0.2762])
    excess = np.mean(10 * np.log10(1 / deviations**2))
    assert excess == pytest.approx(11.485, abs=0.01)


def test_ssim_is_one_for_equal_images_and_matches_the_formula_on_constants() -> None:
    low, high = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(low, high).item() == pytest.approx(luminance, abs=2e-4)
    assert ssim(images(1), images(1)).item() == pytest.approx(1)


def test_ssim_is_the_mean_of_the_local_formula() -> None:
    guess, truth = images(1, seed=1), images(1, seed=2)
    x, y = guess[0, 0].double().numpy(), truth[0, 0].double().numpy()
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    x, y = np.pad(x, 5, mode="reflect"), np.pad(y, 5, mode="reflect")
    local = []
    for i in range(12):
        for j in range(12):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            both = (weights * a * b).sum() - mean_a * mean_b
            spread = (weights * (a * a + b * b)).sum() - mean_a**2 - mean_b**2
            light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            local.append(light * (2 * both + 9e-4) / (spread + 9e-4))
    assert ssim(guess, truth).item() == pytest.approx(np.mean(local), abs=1e-6)


@pytest.mark.parametrize("side", [2, 3, 5, 6])
def test_ssim_of_small_images_uses_a_window_that_fits(side: int) -> None:
    guess, truth = images(2, side=side), images(2, side=side, seed=1)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1])
    assert (ssim(guess, truth) < 0.9).all()


def test_ssim_of_a_single_pixel_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1 x 7 pixels have no SSIM"):
        ssim(torch.rand(1, 1, 1, 7), torch.rand(1, 1, 1, 7))


def test_pearson_agrees_with_numpy_and_forgives_scale_but_not_polarity() -> None:
    guess, truth = images(3, channels=3), images(3, channels=3, seed=1)
    expected = [
        np.corrcoef(g.flatten(), t.flatten())[0, 1] for g, t in zip(guess, truth, strict=True)
    ]
    assert pearson(guess, truth).tolist() == pytest.approx(expected, abs=1e-6)
    assert pearson(3 - 2 * truth, truth).tolist() == pytest.approx([-1] * 3)
    assert abs_pearson(3 - 2 * truth, truth).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize("level", [0.0, 0.1, 1.0, 1e6])
def test_a_constant_image_correlates_with_nothing(level: float) -> None:
    truth = images(2)
    flat = torch.full_like(truth, level)
    assert pearson(flat, truth).tolist() == [0, 0]
    assert pearson(truth, flat).tolist() == [0, 0]
    variance = truth.flatten(1).var(1, correction=0)
    torch.testing.assert_close(affine_mse(flat, truth).float(), variance)


def test_affine_mse_is_the_residual_of_least_squares() -> None:
    guess, truth = images(2), images(2, seed=1)
    for index in range(2):
        x, y = guess[index].flatten().double().numpy(), truth[index].flatten().double().numpy()
        design = np.stack([x, np.ones_like(x)], axis=1)
        residual = np.linalg.lstsq(design, y, rcond=None)[1][0] / len(x)
        assert affine_mse(guess, truth)[index].item() == pytest.approx(residual)
    assert affine_mse(0.3 - 0.1 * truth, truth).tolist() == pytest.approx([0, 0], abs=1e-9)


def test_identification_hits_the_nearest_and_only_the_nearest() -> None:
    candidates = images(50)
    position = torch.tensor([3, 7, 11])
    noisy = candidates[position] + 0.1 * (images(3, seed=1) - 0.5)
    assert identification(1 - noisy, candidates, position).tolist() == [True] * 3
    assert identification(noisy, candidates, position + 1).tolist() == [False] * 3


def test_ties_identify_nothing() -> None:
    candidates = images(10)
    flat = torch.full((1, 1, 12, 12), 0.5)
    assert identification(flat, candidates, torch.tensor([0])).tolist() == [False]
    doubled = torch.cat([candidates, candidates[:1]])
    assert identification(candidates[:1], doubled, torch.tensor([0])).tolist() == [False]


def test_correlations_do_not_depend_on_how_candidates_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guess, others = images(3), images(10, seed=1)
    whole = correlations(guess, others)
    monkeypatch.setattr("leakbed.metrics._CHUNK", 4)
    torch.testing.assert_close(correlations(guess, others), whole)
    assert whole[1, 4].item() == pytest.approx(abs_pearson(guess[1:2], others[4:5]).item())


def test_the_interval_is_clopper_pearson() -> None:
    # With no success the upper end solves (1 - p)^n = 0.025; the lower end is 0.
    low, high = binomial_interval(0, 10)
    assert (low, high) == (0, pytest.approx(1 - 0.025**0.1))
    low, high = binomial_interval(10, 10)
    assert (low, high) == (pytest.approx(0.025**0.1), 1)


def test_skill_runs_from_the_baseline_to_one() -> None:
    assert skill(0.37, 0.37) == 0
    assert skill(1.0, 0.37) == 1
    assert math.isclose(skill(0.685, 0.37), 0.5)
    with pytest.raises(ValueError, match="below 1"):
        skill(1.0, 1.0)
