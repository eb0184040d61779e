import pytest
import torch

from defenses import GradientCompression

GRADIENT = torch.tensor([[5.0, -4.0, 3.0, 0.1], [0.2, -0.4, 0.3, 0.1]])


def sent(gradient: torch.Tensor = GRADIENT, **settings: object) -> torch.Tensor:
    defense = GradientCompression(**settings)  # type: ignore[arg-type]
    state = defense.begin(7)
    after, made = defense.protect_cut_gradient(state, gradient)
    assert after is state
    return made


def test_over_the_batch_a_quiet_sample_loses_its_row() -> None:
    expected = torch.tensor([[5.0, -4.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(sent(ratio=0.3), expected)  # 2.4 of 8 entries, rounded up


def test_per_sample_every_row_keeps_its_share() -> None:
    expected = torch.tensor([[5.0, -4.0, 0.0, 0.0], [0.0, -0.4, 0.3, 0.0]])
    assert torch.equal(sent(ratio=0.5, per="sample"), expected)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_everything_passes_at_ratio_1_whatever_the_shape(per: str) -> None:
    maps = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sent(maps, ratio=1.0, per=per), maps)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_of_equal_entries_no_more_are_kept_than_the_ratio_says(per: str) -> None:
    assert sent(torch.ones(2, 10), ratio=0.2, per=per).sum() == 4


def test_the_noise_of_a_float_product_sends_no_entry_more() -> None:
    assert sent(torch.ones(1, 100), ratio=0.07).sum() == 7  # 0.07 * 100 is a little over 7
    assert sent(torch.ones(1, 100), ratio=1e-9).sum() == 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"needs 0 < ratio <= 1, the share that is sent; got"):
        GradientCompression(ratio=ratio)


def test_an_unknown_ranking_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="sample"):
        GradientCompression(per="samples")
