from dataclasses import replace

import pytest
import torch
from torch import nn

from defenses import SmashedNoise
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run
from leakbed.seeds import derive, generator

SMASHED = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def protected(defense: SmashedNoise, smashed: torch.Tensor, *, stream: int = 7) -> torch.Tensor:
    state, sent = defense.protect_smashed(defense.begin(stream), smashed)
    assert state.messages == 0  # whoever carries the defence counts
    return sent


def test_noise_of_zero_strength_changes_no_bit() -> None:
    assert torch.equal(protected(SmashedNoise(sigma=0.0), SMASHED), SMASHED)


def test_noise_is_sigma_times_the_streams_normal_numbers() -> None:
    noise = torch.randn(SMASHED.shape, generator=generator(derive(7, "message/0")))
    assert torch.equal(protected(SmashedNoise(sigma=0.25), SMASHED), SMASHED + 0.25 * noise)


def test_noise_has_the_deviation_it_says() -> None:
    zeros = torch.zeros(1000, 100)
    noise = protected(SmashedNoise(sigma=0.7), zeros)
    assert noise.std().item() == pytest.approx(0.7, rel=0.01)  # 100,000 draws: 0.2 %
    assert abs(noise.mean().item()) < 0.01
    # The privacy of one row needs the same deviation whatever the row's size.
    assert protected(SmashedNoise(sigma=0.7, clip=0.1), zeros).std() == noise.std()


def test_rows_above_the_clip_shrink_to_it_and_others_stay() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    sent = protected(SmashedNoise(sigma=0.0, clip=1.0), rows)
    torch.testing.assert_close(sent, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    sent = protected(SmashedNoise(sigma=0.0, clip=2.0), SMASHED)
    norms, before = sent.flatten(1).norm(dim=1), SMASHED.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before.clamp_max(2.0))
    assert (norms <= 2.0 * (1 + 1e-6)).all()


def test_the_type_of_the_activations_is_kept() -> None:
    for dtype in (torch.float16, torch.float64):
        assert protected(SmashedNoise(), SMASHED.to(dtype)).dtype == dtype


def test_a_clip_is_refused_where_batchnorm_mixes_the_rows_below_the_cut() -> None:
    """The claim is about one sample's row; there it moves all the others of its batch."""
    bottom = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    moved = bottom(rows) - bottom(torch.cat([rows[:1] + 1, rows[1:]]))
    assert moved[1:].norm() > 0.1
    run = Run(classes=3, rows=8, batch_size=4, steps=2, passes=1, top=nn.Identity(), bottom=bottom)
    with pytest.raises(IllegalCombinationError, match="layer 1 of the bottom is a BatchNorm1d"):
        SmashedNoise(clip=1.0).check_run(run)
    SmashedNoise().check_run(run)  # claims nothing
    SmashedNoise(clip=1.0).check_run(replace(run, bottom=nn.Linear(2, 2)))


def trained_norm(sigma: float, clip: float | None) -> float:
    """The mean norm of what a bottom would send after training under the noise."""
    torch.manual_seed(0)
    images = torch.randn(200, 20)
    labels = (images[:, 0] > 0).long()
    bottom, top = nn.Linear(20, 8), nn.Linear(8, 2)
    parameters = [*bottom.parameters(), *top.parameters()]
    optimiser, defense = torch.optim.Adam(parameters, lr=0.05), SmashedNoise(sigma=sigma, clip=clip)
    state = defense.begin(7)
    for _ in range(300):
        _, sent = defense.protect_smashed(state, bottom(images))
        state = state.next()
        optimiser.zero_grad()
        nn.functional.cross_entropy(top(sent), labels).backward()
        optimiser.step()
    _, sent = replace(defense, sigma=0.0).protect_smashed(state, bottom(images))
    return sent.norm(dim=1).mean().item()


def test_without_a_clip_a_bottom_outgrows_the_noise() -> None:
    """So sigma alone says nothing of what is left to read."""
    assert trained_norm(16.0, None) > 2.5 * trained_norm(0.0, None)
    assert trained_norm(16.0, 1.0) <= 1 + 1e-5
    assert "no fixed protection" in " ".join((SmashedNoise.__doc__ or "").split())


def test_the_claim_says_what_many_messages_make_of_it() -> None:
    assert "every epoch sends it again, so compose" in SmashedNoise.claims


@pytest.mark.parametrize("wrong", [{"sigma": -0.1}, {"clip": 0.0}, {"clip": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="smashed-noise needs sigma >= 0 and clip > 0, got"):
        SmashedNoise(**wrong)
