"""Distances of rows, term by term, and the critic that tells them apart."""

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from attacks.building_blocks.likeness import (
    kernel_distance,
    logistic_loss,
    moment_distance,
    prior_distance,
    row_critic,
)
from leakbed.seeds import scoped


def noise(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_distance_is_the_double_sum() -> None:
    one, other = noise(3, 2, 2, seed=2), noise(4, 2, 2, seed=3)
    rows = [*one.flatten(1), *other.flatten(1)]
    scale = sum(float((a - b).square().sum()) for a in rows for b in rows) / len(rows) ** 2

    def kernel(a: Tensor, b: Tensor) -> float:
        square = (a - b).square().sum()
        return sum(float((-square / (2 * 2.0**p * scale)).exp()) for p in range(-3, 2))

    def mean(left: list[Tensor], right: list[Tensor]) -> float:
        return sum(kernel(a, b) for a in left for b in right) / (len(left) * len(right))

    wanted = mean(rows[:3], rows[:3]) + mean(rows[3:], rows[3:]) - 2 * mean(rows[:3], rows[3:])
    assert float(kernel_distance(one, other)) == pytest.approx(wanted, rel=1e-4)
    assert float(kernel_distance(one, one)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 2), (3,)])
def test_the_moment_distance_is_that_of_every_channel(shape: tuple[int, ...]) -> None:
    one, other = noise(5, *shape, seed=2), noise(6, *shape, seed=3)
    wanted = 0.0
    for channel in range(3):
        a, b = one[:, channel], other[:, channel]
        wanted += float((a.mean() - b.mean()) ** 2)
        wanted += float((a.std(correction=0) - b.std(correction=0)) ** 2)
    assert float(moment_distance(one, other)) == pytest.approx(wanted / 3, rel=1e-4)


def test_the_prior_by_cosine_compares_the_mean_features_alone() -> None:
    one, other = torch.rand(5, 4), torch.rand(7, 4)
    a, b = one.mean(0), other.mean(0)
    wanted = 1 - float(a @ b / (a.norm() * b.norm()))
    assert float(prior_distance(one, other, by="cosine")) == pytest.approx(wanted, abs=1e-6)
    assert float(prior_distance(one, 3 * one, by="cosine")) == pytest.approx(0, abs=1e-6)
    assert torch.equal(prior_distance(one, other, by="mmd"), kernel_distance(one, other))


@pytest.mark.parametrize("shape", [(2, 5, 5), (6,)])
def test_a_critic_learns_to_tell_rows_apart(shape: tuple[int, ...]) -> None:
    with scoped(3):
        critic = row_critic(shape)
        adam = Adam(critic.parameters(), 1e-2)
        real, made = torch.rand(40, *shape) + 0.5, torch.rand(40, *shape)
        for _ in range(15):
            adam.zero_grad()
            loss = logistic_loss(critic(real), high=True) + logistic_loss(critic(made), high=False)
            loss.backward()
            adam.step()
    critic.eval()
    assert critic(real).mean() > critic(made).mean() + 1
