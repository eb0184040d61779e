import pytest
import torch

from defenses import IsoNoise


def sent(gradient: torch.Tensor, **settings: float) -> torch.Tensor:
    defence = IsoNoise(**settings)
    _, made = defence.protect_cut_gradient(defence.begin(7), gradient)
    return made


def test_noise_has_the_ratio_of_the_largest_norm_over_all_entries() -> None:
    rows = torch.zeros(1001, 2, 50)
    rows[0, 0, :2] = torch.tensor([3.0, 4.0])
    noise = sent(rows, ratio=2.0) - rows
    assert noise.std().item() == pytest.approx(2 * 5 / 10, rel=0.02)  # 100,100 draws: 0.2 %
    norms = noise.flatten(1).norm(dim=1)
    assert norms.square().mean().item() == pytest.approx((2 * 5) ** 2, rel=0.02)


def test_every_message_has_its_own_noise() -> None:
    defence, gradient = IsoNoise(), torch.ones(3, 4)
    state = defence.begin(7)
    _, one = defence.protect_cut_gradient(state, gradient)
    _, two = defence.protect_cut_gradient(state.next(), gradient)
    assert not torch.equal(one, two)
    assert torch.equal(one, sent(gradient))


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_that_is_not_above_0_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"iso-noise needs a finite ratio > 0, got"):
        IsoNoise(ratio=ratio)
