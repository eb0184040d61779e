from math import inf, nan

import pytest
from torch import nn

from defenses.privacy_budget import check_budget, refuse_mixing
from leakbed.contracts import IllegalCombinationError


@pytest.mark.parametrize(
    ("epsilon", "delta", "clip"),
    [(0.0, 1e-5, 1.0), (nan, 1e-5, 1.0), (1.0, 1.0, 1.0), (1.0, 1e-5, nan), (1.0, 1e-5, inf)],
)
def test_a_budget_that_bounds_nothing_is_refused(epsilon: float, delta: float, clip: float) -> None:
    check_budget("mine", epsilon=1.0, delta=1e-5, clip=1.0)
    with pytest.raises(ValueError, match="mine needs"):
        check_budget("mine", epsilon=epsilon, delta=delta, clip=clip)


def test_layers_that_mix_samples_are_named() -> None:
    refuse_mixing("mine", nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))
    with pytest.raises(IllegalCombinationError, match="layer 0 of the top is a BatchNorm2d"):
        refuse_mixing("mine", nn.Sequential(nn.BatchNorm2d(2)))
