from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from defenses import DPCutGradient
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run

ROWS = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0], [0.6, 0.8]])


def sent(defense: DPCutGradient, gradient: torch.Tensor) -> torch.Tensor:
    _, made = defense.protect_cut_gradient(defense.begin(7), gradient)
    return made


@pytest.mark.parametrize(("epsilon", "horizon"), [(1.0, 1), (1.0, 20), (8.0, 5)])
def test_an_accountant_finds_the_epsilon_it_claims(epsilon: float, horizon: int) -> None:
    import dp_accounting  # noqa: PLC0415  a second

    defense = DPCutGradient(epsilon=epsilon, horizon=horizon)
    # Rows of norm C and its opposite are 2 C apart: that is the distance the noise must cover.
    event = dp_accounting.GaussianDpEvent(defense.sigma / 2)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(event, horizon)
    assert epsilon <= accountant.get_epsilon(1e-5) <= epsilon * 1.1  # Renyi bounds are not tight
    exact = dp_accounting.get_epsilon_gaussian(defense.sigma / 2 / horizon**0.5, 1e-5)
    assert exact == pytest.approx(epsilon, rel=1e-4)


def test_rows_are_clipped_as_before_the_mean_divides_them() -> None:
    quiet = DPCutGradient(clip=4.0)  # of a mean over four: rows of norm 1
    vars(quiet)["sigma"] = 0.0
    expected = torch.tensor([[0.6, 0.8], [0.03, 0.04], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(sent(quiet, ROWS), expected)


def test_noise_has_sigma_times_the_clip_whatever_the_row() -> None:
    defense = DPCutGradient(epsilon=2.0, clip=5.0)
    zeros = torch.zeros(1000, 2, 50)
    noise = sent(defense, zeros)
    assert noise.shape == zeros.shape
    assert noise.std().item() == pytest.approx(defense.sigma * 5.0 / 1000, rel=0.02)


def test_every_message_has_its_own_noise() -> None:
    defense = DPCutGradient()
    state = defense.begin(7)
    _, one = defense.protect_cut_gradient(state, ROWS)
    _, two = defense.protect_cut_gradient(state.next(), ROWS)
    assert not torch.equal(one, two)


def test_a_run_beyond_the_horizon_is_refused() -> None:
    run = Run(classes=10, rows=9, batch_size=3, steps=9, passes=3, top=nn.Identity())
    with pytest.raises(IllegalCombinationError, match=r"sent 2 times, .* 3 times; set horizon"):
        DPCutGradient(horizon=2).check_run(run)
    DPCutGradient(horizon=3).check_run(run)
    DPCutGradient(horizon=2).check_run(replace(run, passes=2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epsilon": 0.0}, "finite epsilon > 0"),
        ({"epsilon": float("inf")}, "finite epsilon > 0"),
        ({"delta": 0.0}, "0 < delta < 1"),
        ({"delta": 1.0}, "0 < delta < 1"),
        ({"clip": 0.0}, "clip > 0"),
        ({"clip": -1.0}, "clip > 0"),
        ({"clip": float("nan")}, "finite clip > 0"),
        ({"clip": float("inf")}, "finite clip > 0"),
        ({"horizon": 0}, "a horizon of 1 or more"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DPCutGradient(**settings)


def test_batchnorm_in_the_top_is_refused_before_training() -> None:
    top = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    run = Run(classes=3, rows=10, batch_size=2, steps=5, passes=1, top=top)
    with pytest.raises(IllegalCombinationError, match=r"dp-cut-gradient .* is a BatchNorm1d"):
        DPCutGradient().check_run(run)
