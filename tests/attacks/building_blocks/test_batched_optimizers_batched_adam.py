"""The stacked Adam against torch's own, one problem at a time."""

import torch
from torch import Tensor

from attacks.building_blocks.batched_optimizers import Adam, Objective, Problems, descend

CENTRES = torch.tensor([[1.0, -2.0], [0.5, 3.0], [4.0, 0.0]], dtype=torch.float64)


def bowls(centres: Tensor) -> Problems:
    def of(rows: Tensor) -> Objective:
        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            gap = points - centres[rows]
            return gap.pow(4).sum(-1), 4 * gap.pow(3)

        return objective

    return of


def test_every_problem_ends_where_torch_ends_alone() -> None:
    start = torch.zeros_like(CENTRES)
    end = descend(bowls(CENTRES), start, Adam(iterations=25, learning_rate=0.05))
    for row, centre in enumerate(CENTRES):
        point = start[row].clone().requires_grad_()
        optimizer = torch.optim.Adam([point], lr=0.05)
        for _ in range(25):
            optimizer.zero_grad()
            (point - centre).pow(4).sum().backward()
            optimizer.step()
        torch.testing.assert_close(end.point[row], point.detach(), rtol=0, atol=1e-12)
    assert torch.equal(start, torch.zeros_like(CENTRES))
    assert end.evaluations.tolist() == [26, 26, 26]


def test_a_poisoned_problem_disturbs_no_neighbour() -> None:
    start = torch.zeros_like(CENTRES)
    settings = Adam(iterations=25, good_enough=1e-3)
    sound = descend(bowls(CENTRES), start, settings)
    poisoned = CENTRES.clone()
    poisoned[1] = torch.nan
    end = descend(bowls(poisoned), start, settings)
    assert torch.equal(end.point[[0, 2]], sound.point[[0, 2]])
    assert end.failed.tolist() == [False, True, False]
    assert end.value[1] == torch.inf


def test_a_problem_that_still_falls_at_its_end_stopped_on_the_budget() -> None:
    start = torch.zeros_like(CENTRES)
    few = descend(bowls(CENTRES), start, Adam(iterations=25, learning_rate=0.05))
    assert few.on_budget.all()
    done = descend(bowls(CENTRES), start, Adam(iterations=25, learning_rate=0.05, good_enough=0.9))
    assert not done.on_budget.any()

    def lifted(rows: Tensor) -> Objective:
        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            gap = points - CENTRES[rows]
            return gap.square().sum(-1) + 1, 2 * gap

        return objective

    many = descend(lifted, start, Adam(iterations=2000, learning_rate=0.05))
    assert not many.on_budget.any()
    torch.testing.assert_close(many.value, torch.ones_like(many.value))


def test_good_enough_is_a_share_of_the_first_value() -> None:
    start = torch.zeros_like(CENTRES)
    end = descend(bowls(CENTRES), start, Adam(iterations=2000, good_enough=0.5))
    value, _ = bowls(CENTRES)(torch.arange(3))(start)
    assert (end.value <= 0.5 * value).all()
    assert (end.value > 0.1 * value).all()


def test_a_good_enough_problem_stops() -> None:
    end = descend(bowls(CENTRES), CENTRES.clone(), Adam(iterations=25, good_enough=1e-9))
    assert end.evaluations.tolist() == [1, 1, 1]
