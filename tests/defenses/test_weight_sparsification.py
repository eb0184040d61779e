from typing import Any

import pytest
import torch

from defenses import WeightSparsification
from leakbed.tensors import TENSORS

BEFORE = torch.tensor([1.0, -5.0, 3.0, 0.5])
AFTER = torch.tensor([1.5, -5.0, 0.25, -4.0])


def protected(
    before: torch.Tensor = BEFORE, after: torch.Tensor = AFTER, **settings: Any
) -> torch.Tensor:
    defense = WeightSparsification(**settings)
    buffer = torch.tensor(7)
    state = defense.begin(1)
    same, sent = defense.protect_update(
        state, {"w": before, "n": buffer}, {"w": after, "n": buffer}
    )
    assert same is state
    assert sent["n"] is buffer
    return sent["w"]


def published(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which values the official code keeps: those no smaller than a quantile of all."""
    sizes = values.abs()
    return sizes.double() >= torch.quantile(sizes, ratio).item()


@pytest.mark.parametrize("count", [1, 2, 10, 12, 300, 3600])
def test_what_is_dropped_lies_below_the_published_quantile(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=draw)
    for ratio in (0.0, 0.05, 0.1, 0.24, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert torch.equal(TENSORS.kept(values, ratio), published(values, ratio))


def test_a_bias_of_twelve_loses_two_entries_of_ten_percent() -> None:
    """An earlier form rounded down to one."""
    assert TENSORS.kept(torch.arange(1.0, 13.0), 0.1).sum() == 10


def test_ties_at_the_quantile_stay() -> None:
    values = torch.tensor([[1.0, -1.0], [1.0, 0.5]])
    assert TENSORS.kept(values, 0.5).tolist() == [[True, True], [True, False]]
    assert TENSORS.kept(torch.ones(10), 0.3).all()
    assert TENSORS.kept(torch.ones(0, 4), 0.3).shape == (0, 4)


def test_a_tensor_larger_than_torch_s_own_quantile_takes_is_sparsified_too() -> None:
    values = torch.arange(2.0**24 + 2) % 4
    assert torch.equal(TENSORS.kept(values, 0.6), values >= 2)


def test_the_published_difference_is_that_of_two_sparse_snapshots() -> None:
    # Sparse before: 0 -5 3 0; sparse after: 0 -5 0 -4; difference: 0 0 -3 -4.
    sent = protected(ratio=0.5)
    assert (sent - BEFORE).tolist() == [0, 0, -3, -4]


def test_the_corrected_form_keeps_the_largest_changes_as_they_are() -> None:
    # Changes: 0.5 0 -2.75 -4.5.
    assert protected(ratio=0.5, form="corrected").tolist() == [1.0, -5.0, 0.25, -4.0]
    assert protected(ratio=0.75, form="corrected").tolist() == [1.0, -5.0, 3.0, -4.0]


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_a_ratio_of_zero_changes_no_bit(form: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randn(50, 3, generator=draw) for _ in range(2))
    assert torch.equal(protected(before, after, ratio=0.0, form=form), after)


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_the_ratio_is_what_it_says(form: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    before = torch.zeros(1000)
    after = torch.randn(1000, generator=draw)
    sent = protected(before, after, ratio=0.9, form=form)
    assert (sent != 0).sum() == 100
    assert sent.abs()[sent != 0].min() >= after.abs().quantile(0.9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 1.0}, "needs 0 <= ratio < 1, got 1.0"),
        ({"ratio": -0.1}, "needs 0 <= ratio < 1"),
        ({"form": "correct"}, "unknown form 'correct'; did you mean 'corrected'"),
    ],
)
def test_illegal_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSparsification(**wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_its_entries(dtype: torch.dtype) -> None:
    values = torch.linspace(0, 1, 70_000).to(dtype)
    assert TENSORS.kept(values, 0.9).float().mean().item() == pytest.approx(0.1, abs=0.01)
