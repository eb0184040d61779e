"""Perturbations of a node's rows: within the budget, kept, and moved up the gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses import AdversarialTraining
from leakbed.contracts.defense import Holdings
from leakbed.perturbation import BudgetError
from tests.support import tiny
from tests.support.hostile import fuzz

IMAGES, LABELS = tiny.images()
HOLDINGS = Holdings(
    images=IMAGES,
    labels=LABELS,
    architecture=tiny.architecture(),
    bottom={},
    batch_size=8,
    optimiser=tiny.plan().optimiser,
)


@fuzz(30)
@given(budget=st.floats(0.01, 1.0), stride=st.floats(0.01, 4.0), seed=st.integers(0, 99))
def test_no_pixel_leaves_the_budget_or_the_range(budget: float, stride: float, seed: int) -> None:
    defense = AdversarialTraining(budget=budget, stride=stride)
    state, rows = defense.prepare(defense.begin(seed), HOLDINGS), torch.tensor([4, 7, 59])
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(3):
        gradient = torch.randn(3, 1, 6, 6, generator=drawn)
        state = defense.follow_gradient(state, gradient, rows)
        shown = defense.alter_images(state, IMAGES[rows], rows)
        assert 0 <= shown.min() <= shown.max() <= 1
        assert (shown - IMAGES[rows]).abs().max() <= budget + 1e-6


def test_rows_keep_their_perturbations_and_move_alone() -> None:
    defense = AdversarialTraining(budget=0.2, stride=0.5)
    before = defense.prepare(defense.begin(1), HOLDINGS)
    rows = torch.tensor([3, 1])
    after = defense.follow_gradient(before, torch.ones(2, 1, 6, 6), rows)
    assert defense.prepare(after, HOLDINGS) is after  # the next round goes on from it
    (was,), (now,) = before.tensors.values(), after.tensors.values()
    assert torch.equal(now[rows], (was[rows] + 0.1).clamp(-0.2, 0.2))
    others = torch.ones(60, dtype=torch.bool).index_fill(0, rows, value=False)
    assert torch.equal(now[others], was[others])


def test_a_budget_or_a_stride_that_is_none_is_refused() -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        AdversarialTraining(budget=0.0)
    with pytest.raises(ValueError, match="stride above 0"):
        AdversarialTraining(stride=0.0)
