from math import inf, log, nan, sqrt
from typing import Any

import pytest
import torch

from defenses import LocalDP


def sent(defense: LocalDP, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    _, made = defense.protect_update(defense.begin(7), {"w": before}, {"w": after})
    return made["w"]


def test_the_update_is_clipped_and_the_noise_is_the_formula_s() -> None:
    before, after = torch.ones(200_000), torch.ones(200_000)
    after[0] += 5.0
    defense = LocalDP(epsilon=2.0, delta=1e-4, clip=0.5)
    noisy = sent(defense, before, after) - before
    quiet = sent(LocalDP(clip=0.5, sensitivity=0.0), before, after) - before
    assert quiet.norm().item() == pytest.approx(0.5)
    noise = noisy - quiet
    assert noise.std().item() == pytest.approx(0.5 * sqrt(2 * log(1.25e4)) / 2, rel=0.01)
    assert noise.mean().abs().item() < 0.01


def test_the_sensitivity_is_the_noise_s_alone() -> None:
    still = torch.zeros(200_000)
    twice = sent(LocalDP(sensitivity=2.0), still, still)
    assert twice.std().item() == pytest.approx(2 * sqrt(2 * log(1.25e5)), rel=0.01)


def test_its_formula_is_worth_less_than_it_says_above_8() -> None:
    from dp_accounting import get_epsilon_gaussian  # noqa: PLC0415  a second

    worth = {e: get_epsilon_gaussian(LocalDP(epsilon=e).deviation, 1e-5) for e in (0.5, 8.4, 8.6)}
    assert worth[0.5] < 0.5
    assert worth[8.4] < 8.4
    assert worth[8.6] > 8.6
    assert get_epsilon_gaussian(LocalDP(epsilon=48.0).deviation, 1e-5) == pytest.approx(90.5, 0.01)


def test_integer_buffers_pass_and_leave_the_norm_alone() -> None:
    before = {"w": torch.zeros(4), "steps": torch.tensor(0)}
    after = {"w": torch.full((4,), 0.25), "steps": torch.tensor(57)}
    defense = LocalDP(clip=1.0, sensitivity=0.0)
    _, made = defense.protect_update(defense.begin(7), before, after)
    torch.testing.assert_close(made["w"], after["w"])  # of norm 0.5, below the clip
    assert made["steps"].item() == 57


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "local-dp needs a finite epsilon > 0 and 0 < delta < 1, got 0.0"),
        ({"epsilon": nan}, "local-dp needs a finite epsilon"),
        ({"delta": 1.0}, "0 < delta < 1, got 1.0 and 1.0"),
        ({"clip": -1.0}, "local-dp needs a finite clip > 0, got -1.0"),
        ({"sensitivity": -0.5}, "local-dp needs a finite sensitivity >= 0, got -0.5"),
        ({"sensitivity": inf}, "local-dp needs a finite sensitivity >= 0, got inf"),
    ],
)
def test_illegal_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalDP(**wrong)
