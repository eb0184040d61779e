"""What is done with a guess as a whole reaches every field it has, and adds none."""

import torch

from experiments.run.guesses import best_restart, on_cpu, picked
from leakbed.contracts import Guess


def guess(first: float, second: float, *, mark: int) -> Guess:
    return Guess(
        labels=torch.full((2, 1), mark),
        objective=torch.tensor([first, second]),
        clones={"w": torch.full((2, 3), float(mark))},
    )


def test_each_target_keeps_the_guess_of_lower_objective() -> None:
    best = best_restart(guess(1.0, 2.0, mark=0), guess(0.5, 3.0, mark=1))
    assert best.labels is not None
    assert best.labels.flatten().tolist() == [1, 0]
    assert best.clones is not None
    assert best.clones["w"][:, 0].tolist() == [1, 0]
    assert best.images is None


def test_a_failure_loses_and_without_objectives_the_first_stays() -> None:
    best = best_restart(guess(torch.nan, 2.0, mark=0), guess(9.0, torch.nan, mark=1))
    assert best.labels is not None
    assert best.labels.flatten().tolist() == [1, 0]
    blind = Guess(labels=torch.zeros(2, 1, dtype=torch.int64))
    assert best_restart(blind, guess(0.0, 0.0, mark=1)) is blind


def test_picking_reaches_every_field() -> None:
    only = picked(guess(1.0, 2.0, mark=4), torch.tensor([False, True]))
    assert only.objective is not None
    assert only.objective.tolist() == [2.0]
    assert only.labels is not None
    assert only.labels.shape == (1, 1)
    assert only.clones is not None
    assert only.clones["w"].shape == (1, 3)
    assert only.failed is None


def test_what_comes_home_remembers_no_computation() -> None:
    leaf = torch.ones(2, requires_grad=True)
    home = on_cpu(Guess(objective=leaf * 2))
    assert home.objective is not None
    assert not home.objective.requires_grad


def test_clusters_of_two_runs_are_not_mixed() -> None:
    first = Guess(
        clusters=torch.tensor([[0], [0], [1], [1]]), objective=torch.tensor([1.0, 3.0, 1.0, 3.0])
    )
    second = Guess(
        clusters=torch.tensor([[1], [1], [0], [0]]),
        objective=torch.tensor([1.9, 1.9, torch.inf, 1.9]),
    )
    assert best_restart(first, second) is second
    assert best_restart(second, first) is second
