from dataclasses import replace

import pytest
import torch
from torch import nn

from defenses import MaxNorm
from leakbed.contracts import IllegalCombinationError
from leakbed.contracts.defense import Run

GRADIENT = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 1.0]])


def sent(gradient: torch.Tensor, stream: int = 7) -> torch.Tensor:
    defense = MaxNorm()
    _, made = defense.protect_cut_gradient(defense.begin(stream), gradient)
    return made


def test_noise_lies_along_each_row_and_the_largest_has_none() -> None:
    made = sent(GRADIENT)
    assert torch.equal(made[0], GRADIENT[0])
    cosines = torch.nn.functional.cosine_similarity(made, GRADIENT).abs()
    torch.testing.assert_close(cosines, torch.ones(3))
    assert not torch.equal(made[1:], GRADIENT[1:])


def test_the_published_factor() -> None:
    draw = torch.randn(3, 1, generator=MaxNorm().begin(7).generator())
    sigma = (25 / torch.tensor([[25.0], [1.0], [1.0]]) - 1).sqrt()
    torch.testing.assert_close(sent(GRADIENT), GRADIENT * (1 + sigma * draw))


def test_expected_squared_norms_are_the_largest_rows() -> None:
    quiet = [torch.full((20_000, 2), 0.5), torch.zeros(20_000, 2)]
    rows = torch.cat([torch.tensor([[3.0, 4.0]]), *quiet])
    squares = sent(rows).square().sum(1)
    assert squares[1:20_001].mean().item() == pytest.approx(25, rel=0.05)
    assert squares[20_001:].mean().item() == pytest.approx(25, rel=0.05)  # rows of zeros too


def test_every_message_has_its_own_noise_whatever_the_shape() -> None:
    defense = MaxNorm()
    state = defense.begin(7)
    maps = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    _, one = defense.protect_cut_gradient(state, maps)
    _, two = defense.protect_cut_gradient(state.next(), maps)
    assert one.shape == maps.shape
    assert not torch.equal(one, two)
    assert torch.equal(sent(torch.zeros(3, 2)), torch.zeros(3, 2))


RUN = Run(classes=2, rows=9, batch_size=4, steps=3, passes=1, top=nn.Identity(), smallest_batch=2)


def test_a_batch_of_one_row_is_refused_before_training_and_after() -> None:
    """Its own norm would be the largest of the batch, so the message would still tell it."""
    MaxNorm().check_run(RUN)
    with pytest.raises(IllegalCombinationError, match=r"max-norm .* last batch .* one row"):
        MaxNorm().check_run(replace(RUN, smallest_batch=1))
    with pytest.raises(IllegalCombinationError, match=r"max-norm .* every batch"):
        MaxNorm().check_run(replace(RUN, smallest_batch=1, batch_size=1))
    with pytest.raises(IllegalCombinationError, match="max-norm got a cut gradient of one row"):
        MaxNorm().protect_cut_gradient(MaxNorm().begin(7), torch.ones(1, 2))
