"""Caps against mechanisms that reach them, and the floor against ridge regression."""

import math

import pytest
import torch
from scipy.stats import norm

from leakbed.contracts.noise_laws import Channel, of_answers
from leakbed.oracle.caps import budget_cap, budget_of, cap, class_cap, reconstruction_floor


def answered(classes: int, epsilon: float) -> Channel:
    keep = 1 / (1 + (classes - 1) * math.exp(-epsilon))
    answers = torch.full((classes, classes), (1 - keep) / (classes - 1), dtype=torch.float64)
    return Channel(answers=answers.fill_diagonal_(keep))


def even(classes: int) -> torch.Tensor:
    return torch.full((classes,), 1 / classes)


@pytest.mark.parametrize(("classes", "tight"), [(2, True), (10, False), (10_000, True)])
def test_an_epsilon_caps_randomised_response_which_reaches_it(classes: int, tight: bool) -> None:
    """Of two classes by the second bound, of very many by the first."""
    channel = answered(classes, 1.0) if classes < 100 else None
    keep = 1 / (1 + (classes - 1) * math.exp(-1.0))
    if channel is not None:
        assert budget_of(channel) == pytest.approx(1.0)
        assert of_answers(channel, even(classes)) == pytest.approx(keep)
    allowed = budget_cap(1.0, 0.0, chance=1 / classes)
    assert keep <= allowed + 1e-12
    if classes > 2:
        assert (keep == pytest.approx(allowed, rel=1e-3)) is tight
    else:
        assert allowed == pytest.approx(1 - math.exp(-1.0) / 2)


def test_a_delta_that_tells_everything_reaches_its_cap() -> None:
    classes, delta = 10**6, 0.2
    keep = 1 / (1 + (classes - 1) * math.exp(-1.0))
    reached = delta + (1 - delta) * keep
    allowed = budget_cap(1.0, delta, chance=1 / classes)
    assert reached <= allowed == pytest.approx(reached, abs=1e-5)
    assert budget_cap(0.0, 0.0, chance=0.3) == pytest.approx(0.3)
    assert budget_cap(math.inf, 0.0, chance=0.3) == 1.0
    assert budget_cap(800.0, 0.0, chance=0.3) == 1.0


def test_an_answer_that_some_labels_never_get_has_no_epsilon() -> None:
    assert budget_of(Channel(answers=torch.tensor([[0.5, 0.5], [1.0, 0.0]]))) == math.inf
    unused = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])  # an answer that nobody gives
    assert budget_of(Channel(answers=unused)) == pytest.approx(math.log(2.5))


def test_two_classes_of_unequal_shares_reach_the_cap_by_their_likelihood_ratio() -> None:
    """Two points that are a radius apart: the best guess has Bayes' threshold between them."""
    mu, share = 1.3, 0.8
    place = mu / 2 + math.log(share / (1 - share)) / mu
    bayes = share * norm.cdf(place) + (1 - share) * norm.cdf(mu - place)
    # One class sends the reference, the other is mu away: two points of radius mu/2 each.
    assert class_cap(mu / 2, torch.tensor([share, 1 - share])) == pytest.approx(bayes)
    assert class_cap(1.1, even(10)) == pytest.approx(cap(1.1, chance=0.1))
    assert class_cap(0.0, torch.tensor([0.7, 0.3])) == pytest.approx(0.7)
    assert class_cap(50.0, torch.tensor([0.7, 0.3])) == pytest.approx(1.0)


def test_the_floor_is_the_formula_and_ridge_regression_reaches_it() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, width, entries, sigma = 20_000, 8, 5, 0.7
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    bottom = torch.randn(entries, width, generator=generator, dtype=torch.float64)
    data = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing
    some = data[:400]  # the matrix of rows is as large as they are many
    covariance = (some - some.mean(0)).T @ (some - some.mean(0)) / len(some)
    sent = bottom @ covariance
    noisy = sent @ bottom.T + sigma**2 * torch.eye(entries, dtype=torch.float64)
    wanted = torch.trace(covariance - sent.T @ torch.linalg.solve(noisy, sent)) / width
    found = reconstruction_floor(some, some @ bottom.T + 4, sigma)  # affine is as good
    assert found == pytest.approx(float(wanted), rel=1e-9)

    seen = data @ bottom.T
    seen = seen + sigma * torch.randn(seen.shape, generator=generator, dtype=torch.float64)
    half = rows // 2
    weights = torch.linalg.lstsq(seen[:half], data[:half]).solution
    error = float((seen[half:] @ weights - data[half:]).square().mean())
    population = mixing.T @ mixing
    sent = bottom @ population
    noisy = sent @ bottom.T + sigma**2 * torch.eye(entries, dtype=torch.float64)
    floor = float(torch.trace(population - sent.T @ torch.linalg.solve(noisy, sent))) / width
    assert error == pytest.approx(floor, rel=0.03)
    assert error > 0.97 * floor


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in (0.0, 1.2):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            cap(1.0, chance=wrong)
    with pytest.raises(ValueError, match="mu is -1"):
        cap(-1.0, chance=0.5)
    with pytest.raises(ValueError, match="give 0 or more"):
        budget_cap(-1.0, 0.0, chance=0.5)
    with pytest.raises(ValueError, match="without noise"):
        reconstruction_floor(torch.eye(3), torch.eye(3), 0.0)
