"""Perturbed images keep their budget, and the ascent is that of torchattacks bit for bit.

Of torchattacks 3.5.1 there is a literal reading here, so that the bits are compared everywhere;
where the package can be imported, it stands beside it.
"""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leakbed.perturbation import (
    BudgetError,
    Normalised,
    against_features,
    against_labels,
    ascend,
    random_signs,
    refuse_beyond,
)
from leakbed.seeds import generator, scoped
from tests.support.hostile import fuzz


def _network(channels: int = 1, classes: int = 3) -> nn.Sequential:
    with scoped(5):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes)
        ).eval()


def _images(channels: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.rand(4, channels, 8, 8, generator=generator(seed)).round(decimals=1)


@fuzz(30)
@given(
    budget=st.floats(0.001, 1.0),
    ascent=st.tuples(st.floats(0.001, 3.0), st.integers(1, 4)),
    seed=st.integers(0, 99),
    normalisation=st.tuples(st.floats(-3, 3), st.floats(0.01, 5)),
    distance=st.sampled_from(["l2", "cosine", "label"]),
)
def test_no_pixel_leaves_the_budget_or_the_range_for_any_normalisation(
    budget: float,
    ascent: tuple[float, int],
    seed: int,
    normalisation: tuple[float, float],
    distance: str,
) -> None:
    (step, steps), (mean, std) = ascent, normalisation
    images = _images(2, seed)
    network = Normalised(_network(2), mean=[mean, 0], std=[std, 1], channels=2)
    climbed = (
        against_labels(network, torch.tensor([0, 1, 2, 0]))
        if distance == "label"
        else against_features(network, images, distance=distance)
    )
    before = images.clone()
    found = ascend(
        climbed, images, budget=budget, step=step, steps=steps, generator=generator(seed)
    )
    refuse_beyond(found, images, budget=budget)
    refuse_beyond(
        random_signs(images, budget=budget, generator=generator(seed)), images, budget=budget
    )
    assert torch.equal(images, before)
    assert found.requires_grad is False


def test_a_step_beyond_the_budget_reaches_its_wall_exactly() -> None:
    images = torch.full((4, 1, 8, 8), 0.5)
    found = ascend(
        against_labels(_network(), torch.tensor([0, 1, 2, 0])),
        images,
        budget=0.25,
        step=1.0,
        steps=1,
    )
    moved = (found - images).abs()
    assert torch.all((moved == 0.25) | (moved == 0))
    assert (moved == 0.25).any()


def test_features_move_further_than_random_signs_move_them() -> None:
    layers, images = _network()[:3], _images()
    climbed = against_features(layers, images)
    found = ascend(climbed, images, budget=0.2, step=0.025, steps=20, generator=generator(1))
    signs = random_signs(images, budget=0.2, generator=generator(1))
    assert climbed(found) > 1.5 * climbed(signs)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_distance_is_the_one_written_down(distance: str) -> None:
    layers, images = _network(), _images()
    moved = _images(seed=9)
    a, b = layers(images), layers(moved)
    expected = (
        (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
        if distance == "cosine"
        else ((a - b) ** 2).sum(1).mean()
    )
    torch.testing.assert_close(against_features(layers, images, distance=distance)(moved), expected)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        ascend(
            against_labels(_network(), torch.zeros(4, dtype=torch.long)),
            _images(),
            budget=budget,
            step=0.1,
            steps=1,
        )


@pytest.mark.parametrize(("step", "steps"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (0.1, 0)])
def test_an_ascent_that_moves_nothing_is_refused(step: float, steps: int) -> None:
    climbed = against_labels(_network(), torch.zeros(4, dtype=torch.long))
    with pytest.raises(BudgetError, match="move nothing"):
        ascend(climbed, _images(), budget=0.1, step=step, steps=steps)


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5], []), ([], [0.5]), ([0.5], [0.0]), ([0.5], [-1.0]), ([float("nan")], [1.0])],
)
def test_a_normalisation_without_its_numbers_is_refused(
    mean: list[float], std: list[float]
) -> None:
    with pytest.raises(BudgetError, match="one std above 0 per channel"):
        Normalised(_network(), mean=mean, std=std, channels=1)


def test_a_normalisation_of_other_channels_is_refused() -> None:
    with pytest.raises(BudgetError, match="for images of 1"):
        Normalised(_network(), mean=[0, 0, 0], std=[1, 1, 1], channels=1)


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(BudgetError, match="l2 or cosine"):
        against_features(_network(), _images(), distance="l1")


def test_images_that_break_their_budget_are_refused() -> None:
    images = torch.full((1, 1, 2, 2), 0.5)
    refuse_beyond(images + 0.1, images, budget=0.1)
    with pytest.raises(BudgetError, match=r"budget of 0\.1"):
        refuse_beyond(images + 0.11, images, budget=0.1)
    with pytest.raises(BudgetError, match=r"within \[0, 1\]"):
        refuse_beyond(images + 0.6, images, budget=0.9)


def _as_published(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    random_start: bool,
) -> torch.Tensor:
    """Literal reading of ``PGD`` of torchattacks 3.5.1, untargeted, in our words; no code of it."""
    criterion = nn.CrossEntropyLoss()
    adversarial = images.detach().clone()
    if random_start:
        noise = torch.empty_like(adversarial).uniform_(-eps, eps)
        adversarial = torch.clamp(adversarial + noise, min=0, max=1)
    for _ in range(steps):
        leaf = adversarial.detach().requires_grad_()
        criterion(network(leaf), labels).backward()
        assert leaf.grad is not None
        raised = adversarial + alpha * torch.sign(leaf.grad)
        change = torch.clamp(raised - images, min=-eps, max=eps)
        adversarial = torch.clamp(images + change, min=0, max=1)
    return adversarial


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(("eps", "alpha"), [(0.2, 0.025), (8 / 255, 2 / 255), (0.9, 0.3)])
def test_the_ascent_is_a_literal_reading_of_torchattacks_bit_for_bit(
    start: bool, eps: float, alpha: float
) -> None:
    network, labels = _network(3), torch.tensor([0, 1, 2, 0])
    images = torch.rand(4, 3, 8, 8, generator=generator(3))
    with scoped(17):
        theirs = _as_published(
            network, images, labels, eps=eps, alpha=alpha, steps=20, random_start=start
        )
    assert not torch.equal(theirs, images)
    ours = ascend(
        against_labels(network, labels),
        images,
        budget=eps,
        step=alpha,
        steps=20,
        generator=generator(17) if start else None,
    )
    assert torch.equal(theirs, ours)


@pytest.mark.skipif(
    importlib.util.find_spec("torchattacks") is None, reason="torchattacks is not installed"
)
@pytest.mark.parametrize("start", [True, False])
def test_the_ascent_is_torchattacks_bit_for_bit(start: bool) -> None:
    import torchattacks  # noqa: PLC0415  where it is installed

    network, images, labels = _network(), _images(), torch.tensor([0, 1, 2, 0])
    with scoped(17):
        theirs = torchattacks.PGD(network, eps=0.2, alpha=0.025, steps=20, random_start=start)(
            images, labels
        )
    ours = ascend(
        against_labels(network, labels),
        images,
        budget=0.2,
        step=0.025,
        steps=20,
        generator=generator(17) if start else None,
    )
    assert torch.equal(theirs, ours)
