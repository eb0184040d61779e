from dataclasses import replace

import pytest
import torch
from torch import nn

from defenses import IsoNoise
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run


def sent(gradient: torch.Tensor, **settings: float) -> torch.Tensor:
    defense = IsoNoise(**settings)
    _, made = defense.protect_cut_gradient(defense.begin(7), gradient)
    return made


def test_noise_has_the_ratio_of_the_largest_norm_over_all_entries() -> None:
    rows = torch.zeros(1001, 2, 50)
    rows[0, 0, :2] = torch.tensor([3.0, 4.0])
    noise = sent(rows, ratio=2.0) - rows
    assert noise.std().item() == pytest.approx(2 * 5 / 10, rel=0.02)  # 100,100 draws: 0.2 %
    norms = noise.flatten(1).norm(dim=1)
    assert norms.square().mean().item() == pytest.approx((2 * 5) ** 2, rel=0.02)


def test_every_message_has_its_own_noise() -> None:
    defense, gradient = IsoNoise(), torch.ones(3, 4)
    state = defense.begin(7)
    _, one = defense.protect_cut_gradient(state, gradient)
    _, two = defense.protect_cut_gradient(state.next(), gradient)
    assert not torch.equal(one, two)
    assert torch.equal(one, sent(gradient))


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_that_is_not_above_0_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"iso-noise needs a finite ratio > 0, got"):
        IsoNoise(ratio=ratio)


RUN = Run(classes=2, rows=9, batch_size=4, steps=3, passes=1, top=nn.Identity(), smallest_batch=2)


def test_a_batch_of_one_row_is_refused_before_training_and_after() -> None:
    """Its own norm would be the largest of the batch, so the message would still tell it."""
    IsoNoise().check_run(RUN)
    with pytest.raises(IllegalCombinationError, match=r"iso-noise .* last batch .* one row"):
        IsoNoise().check_run(replace(RUN, smallest_batch=1))
    with pytest.raises(IllegalCombinationError, match=r"iso-noise .* every batch"):
        IsoNoise().check_run(replace(RUN, smallest_batch=1, batch_size=1))
    with pytest.raises(IllegalCombinationError, match="iso-noise got a cut gradient of one row"):
        IsoNoise().protect_cut_gradient(IsoNoise().begin(7), torch.ones(1, 2))


def test_the_size_of_the_noise_tells_the_label_of_the_longest_row() -> None:
    """A reader that knows what row 0 is under either label looks at everybody's noise.

    Under label 1 row 0 is the longest, by a tenth; under label 0 it is as long as the others. The
    own row's noise hardly tells which, that of all 64 rows does.
    """
    draw = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(64, 32, generator=draw))
    ways = torch.stack([rows[0], 1.1 * rows[0]])
    state, hits = IsoNoise().begin(7), {"own": 0, "all": 0}
    for label in [0, 1] * 200:
        gradient = torch.cat([ways[label : label + 1], rows[1:]])
        _, message = IsoNoise(ratio=16.0).protect_cut_gradient(state, gradient)
        state = state.next()
        own = [likelihood(message[:1] - way, way.norm()) for way in ways]
        rest = [likelihood(message[1:] - rows[1:], way.norm()) for way in ways]
        hits["own"] += (own[1] > own[0]) == label
        hits["all"] += (own[1] + rest[1] > own[0] + rest[0]) == label
    assert hits["own"] / 400 < 0.75
    assert hits["all"] / 400 > 0.98
    assert "of all rows" in " ".join((IsoNoise.__doc__ or "").split())


def likelihood(noise: torch.Tensor, longest: torch.Tensor) -> float:
    """The log-density of the noise that a batch with a longest row of this norm gets."""
    deviation = 16.0 * longest / noise.shape[1] ** 0.5
    return torch.distributions.Normal(0.0, deviation).log_prob(noise).sum().item()
