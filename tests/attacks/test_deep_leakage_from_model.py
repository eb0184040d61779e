"""DLM against a slow literal reading of the paper, on small victims, and its empty minima."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attacks.deep_leakage_from_model import DeepLeakageFromModel
from leakbed.contracts import Guess, UnfitViewError
from leakbed.seeds import generator
from tests.support.budgets import assert_doubling_changes_little, unbound
from tests.support.weight_updates import (
    Victims,
    digit_victims,
    literal_search,
    small_victims,
)

SEED = 6


def literal(victims: Victims, target: int, *, iterations: int, k: float) -> Tensor:
    """Return DLM's dummy image after some L-BFGS iterations, as the paper has it."""
    factor = torch.tensor([k], dtype=torch.float64, requires_grad=True)

    def gap(gradients: list[Tensor], moved: list[Tensor]) -> Tensor:
        pairs = zip(gradients, moved, strict=True)
        return torch.stack([((g - factor * m) ** 2).sum() for g, m in pairs]).sum()

    return literal_search(victims, target, gap, seed=SEED, iterations=iterations, beside=[factor])


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_first_iterations_are_those_of_the_paper(iterations: int) -> None:
    victims = small_victims(2)
    attack = DeepLeakageFromModel(
        scale="published",
        sweep=(120.0,),
        guard=False,
        iterations=iterations,
        restarts=1,
        patience=None,
        good_enough=0.0,
    )
    images = attack.run(victims.view, seed=SEED).images
    assert images is not None
    for target in range(2):
        expected = literal(victims, target, iterations=iterations, k=120.0)
        torch.testing.assert_close(images[target].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learning_rate", [0.01, 0.5])
def test_images_come_back_at_any_learning_rate(learning_rate: float) -> None:
    victims = small_victims(2, learning_rate=learning_rate)
    attack = DeepLeakageFromModel(restarts=1, good_enough=1e-8)
    guess = attack.run(victims.view, seed=SEED)
    assert (victims.errors(guess) < 1e-3).all()
    assert guess.labels is not None
    assert torch.equal(guess.labels, victims.labels)


def test_an_empty_minimum_is_not_mistaken_for_a_solution() -> None:
    attack = DeepLeakageFromModel()
    update = {"weight": torch.tensor([3.0, 4.0])}
    solved = attack.mismatch(
        {"weight": torch.tensor([6.0, 8.0])}, update, objective=torch.tensor(1e-3)
    )
    empty = attack.mismatch(
        {"weight": torch.tensor([4e-6, -3e-6])}, update, objective=torch.tensor(1e-11)
    )
    opposite = attack.mismatch(
        {"weight": torch.tensor([-3.0, -4.0])}, update, objective=torch.tensor(0.0)
    )
    assert solved.item() == pytest.approx(0, abs=1e-6)
    assert empty.item() == pytest.approx(1)
    assert opposite.item() == pytest.approx(1)


def test_a_scale_in_closed_form_is_the_best_one() -> None:
    draw = generator(2)
    gradient = {"weight": torch.randn(5, generator=draw, dtype=torch.float64)}
    update = {"weight": 0.1 * gradient["weight"] + 0.05 * torch.randn(5, generator=draw)}
    none = torch.empty(0, dtype=torch.float64)
    closed = DeepLeakageFromModel(scale="closed-form").objective(gradient, update, unknowns=none)
    ks = torch.linspace(0, 20, 2001, dtype=torch.float64)
    gaps = [
        DeepLeakageFromModel(scale="published").objective(gradient, update, unknowns=k[None])
        for k in ks
    ]
    assert closed.item() == pytest.approx(torch.stack(gaps).min().item(), rel=1e-3)


def test_every_scale_returns_a_guess_for_every_target() -> None:
    view = small_victims(2, learning_rate=0.1).view
    for scale in ("published", "closed-form"):
        guess = DeepLeakageFromModel(scale=scale, sweep=(5.0, 9.0), iterations=2).run(view, seed=1)
        assert guess.objective is not None
        assert guess.objective.shape == (2,)
        assert guess.objective.isfinite().all()


def test_settings_and_updates_it_cannot_use_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'published'"):
        DeepLeakageFromModel(scale="publish")
    with pytest.raises(ValueError, match="sweep is empty"):
        DeepLeakageFromModel(sweep=())
    view = small_victims(1).view
    assert view.before is not None
    assert view.after is not None
    unbiased = replace(
        view,
        before={name: tensor for name, tensor in view.before.items() if name != "6.bias"},
        after={name: tensor for name, tensor in view.after.items() if name != "6.bias"},
    )
    with pytest.raises(UnfitViewError, match="needs a last layer with a bias"):
        DeepLeakageFromModel().run(unbiased, seed=SEED)


@pytest.mark.reproduces
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("learning_rate", [0.01, 0.1])
def test_digits_come_back_without_labels_or_learning_rate(learning_rate: float) -> None:
    victims = digit_victims(learning_rate=learning_rate)
    guess = DeepLeakageFromModel().run(victims.view, seed=SEED)
    assert (victims.errors(guess) < 1e-3).float().mean() >= 0.60


@pytest.mark.reproduces
@pytest.mark.timeout(3600)
def test_default_initialisation_protects_no_digit() -> None:
    victims = digit_victims(32, learning_rate=0.01, initialisation="default")
    guess = DeepLeakageFromModel(restarts=1).run(victims.view, seed=SEED)
    assert (victims.errors(guess) < 1e-3).float().mean() >= 0.90


@pytest.mark.reproduces
@pytest.mark.timeout(3600)
def test_doubling_a_budget_that_is_not_the_bound_changes_little() -> None:
    victims = digit_victims(16, learning_rate=0.01, initialisation="default")

    def attacked(budget: int) -> Guess:
        return DeepLeakageFromModel(iterations=budget, restarts=1).run(victims.view, seed=SEED)

    budget = unbound(attacked, [100, 200, 400, 800, 1600, 3200])
    assert_doubling_changes_little(attacked, victims.images[:, 0], budget=budget)
