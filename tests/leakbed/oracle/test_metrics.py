"""Every metric against numbers worked out by hand or by another library."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from leakbed.oracle.metrics import (
    PSNR_CEILING,
    abs_pearson,
    affine_mse,
    binomial_interval,
    correlations,
    has_ssim,
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


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. (2004), equation 13, window by window; of the windows within the image."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    local = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            both = (weights * a * b).sum() - mean_a * mean_b
            spread = (weights * (a * a + b * b)).sum() - mean_a**2 - mean_b**2
            light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            local.append(light * (2 * both + 9e-4) / (spread + 9e-4))
    return float(np.mean(local))


@pytest.mark.parametrize("side", [11, 12, 28])
def test_ssim_is_the_mean_of_the_local_formula_over_windows_within_the_image(side: int) -> None:
    guess, truth = images(2, side=side, channels=2, seed=1), images(2, side=side, channels=2)
    guess = (guess + truth) / 2
    x, y = guess.double().numpy(), truth.double().numpy()
    expected = [np.mean([reference_ssim(x[i, c], y[i, c]) for c in (0, 1)]) for i in (0, 1)]
    assert ssim(guess, truth).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_is_scikit_images_by_its_own_recipe() -> None:
    """Its filters, its default truncation, its crop: scikit-image itself is no dependency."""
    guess, truth = images(1, side=28, seed=1), images(1, side=28)
    x, y = guess[0, 0].double().numpy(), truth[0, 0].double().numpy()

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5, mode="reflect")

    both = mean(x * y) - mean(x) * mean(y)
    spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    above = (2 * mean(x) * mean(y) + 0.01**2) * (2 * both + 0.03**2)
    whole = above / ((mean(x) ** 2 + mean(y) ** 2 + 0.01**2) * (spread + 0.03**2))
    assert ssim(guess, truth).item() == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 28), (1, 1, 28, 1), (1, 3, 10, 28)])
def test_ssim_of_images_under_its_window_is_refused(shape: tuple[int, ...]) -> None:
    assert not has_ssim(torch.rand(shape))
    with pytest.raises(ValueError, match=f"{shape[2]} x {shape[3]} pixels have no SSIM"):
        ssim(torch.rand(shape), torch.rand(shape))


def test_pearson_agrees_with_numpy_and_forgives_scale_but_not_polarity() -> None:
    guess, truth = images(3, channels=3), images(3, channels=3, seed=1)
    expected = [
        np.corrcoef(g.flatten(), t.flatten())[0, 1] for g, t in zip(guess, truth, strict=True)
    ]
    assert pearson(guess, truth).tolist() == pytest.approx(expected, abs=1e-5)
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_that_is_not_finite_has_no_finite_value_and_disturbs_no_other(
    value: float,
) -> None:
    guess, truth = images(2), images(2, seed=1)
    whole = {each.__name__: each(guess, truth) for each in (mse, ssim, abs_pearson, affine_mse)}
    guess[1, 0, 3, 3] = value
    for each in (mse, ssim, abs_pearson, affine_mse):
        broken = each(guess, truth)
        assert not broken[1].isfinite()
        assert broken[0] == pytest.approx(whole[each.__name__][0])
    assert identification(guess, images(5, seed=1), torch.tensor([0, 1])).tolist()[1] is False


def test_correlations_do_not_depend_on_how_candidates_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guess, others = images(3), images(10, seed=1)
    whole = correlations(guess, others)
    monkeypatch.setattr("leakbed.oracle.metrics._CHUNK", 4)
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
