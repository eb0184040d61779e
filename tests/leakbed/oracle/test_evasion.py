"""Altered inputs: rates counted by hand, budgets kept, and break-downs that evade nothing."""

import pytest
import torch
from torch import nn

from leakbed.oracle import GuessShapeError
from leakbed.oracle.evasion import score_evasion
from leakbed.perturbation import BudgetError


class _Bright(nn.Module):
    """Says 1 for images whose mean is above a half, else 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def _images(*means: float) -> torch.Tensor:
    return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


LABELS = torch.tensor([0, 1, 0, 1])
NATURAL = _images(0.4, 0.6, 0.6, 0.9)  # the third is wrong as it is


def test_rates_are_of_all_images_and_of_those_that_were_right() -> None:
    near, far = _images(0.45, 0.55, 0.55, 0.85), _images(0.6, 0.4, 0.4, 0.7)
    found = score_evasion(
        torch.stack([far, near], dim=1),
        budgets=(0.2, 0.05),
        network=_Bright(),
        images=NATURAL,
        labels=LABELS,
    )
    assert found.clean_accuracy == 0.75
    assert found.as_list() == [
        {"budget": 0.2, "misclassification": 0.5, "fooled": pytest.approx(2 / 3)},
        {"budget": 0.05, "misclassification": 0.25, "fooled": 0.0},
    ]
    summary = found.misclassification()
    assert summary.values == (1.0, 1.0, 0.0, 0.0)
    assert summary.interval is not None
    assert summary.interval[0] < 0.5 < summary.interval[1]
    assert found.failures == 0


def test_an_image_that_is_not_finite_or_failed_counts_as_the_natural_one() -> None:
    altered = _images(0.6, 0.4, 0.4, 0.7)[:, None].clone()
    altered[0] = torch.nan
    found = score_evasion(
        altered,
        budgets=(0.2,),
        network=_Bright(),
        images=NATURAL,
        labels=LABELS,
        failed=torch.tensor([False, True, False, False]),
    )
    assert found.altered[:, 0].tolist() == [0, 1, 0, 1]
    assert found.failures == 2


def test_where_nothing_was_right_nothing_can_be_fooled() -> None:
    found = score_evasion(
        NATURAL[:, None],
        budgets=(0.1,),
        network=_Bright(),
        images=NATURAL,
        labels=torch.tensor([1, 0, 0, 0]),
    )
    assert found.clean_accuracy == 0
    assert found.fooled() is None


@pytest.mark.parametrize("shift", [0.2, 0.11])
def test_an_image_beyond_the_stated_budget_is_refused(shift: float) -> None:
    with pytest.raises(BudgetError, match=r"budget of 0\.1"):
        score_evasion(
            (NATURAL - shift)[:, None],
            budgets=(0.1,),
            network=_Bright(),
            images=NATURAL,
            labels=LABELS,
        )


def test_other_images_or_budgets_than_asked_for_are_refused() -> None:
    for altered, budgets in ((NATURAL[:3, None], (0.1,)), (NATURAL[:, None], (0.1, 0.2))):
        with pytest.raises(GuessShapeError, match="alter every image within every budget"):
            score_evasion(
                altered, budgets=budgets, network=_Bright(), images=NATURAL, labels=LABELS
            )
