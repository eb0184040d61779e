"""The stacked L-BFGS against torch's own, one problem at a time, and what may not leak between."""

import pytest
import torch
from torch import Tensor

from attacks.building_blocks.batched_optimizers import Lbfgs, Objective, Problems, minimise
from leakbed.seeds import generator

SIZE = 6


def curved(count: int = 3, *, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Return the matrices and starts of some quartic bowls, each of its own shape."""
    draw = generator(3)
    matrices = torch.randn(count, size, size, generator=draw, dtype=torch.float64)
    return matrices, torch.randn(count, size, generator=draw, dtype=torch.float64)


def value_of(point: Tensor, matrix: Tensor) -> Tensor:
    image = (matrix @ point.unsqueeze(-1)).squeeze(-1) - 1
    return image.square().sum(-1) + 0.1 * point.pow(4).sum(-1)


def problems_of(matrices: Tensor) -> Problems:
    def of(rows: Tensor) -> Objective:
        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            values = value_of(points, matrices[rows])
            (gradients,) = torch.autograd.grad(values.sum(), points)
            return values.detach(), gradients

        return objective

    return of


def scaled(problems: Problems, scale: float) -> Problems:
    """Return the same problems with every value and gradient times a number."""

    def of(rows: Tensor) -> Objective:
        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = problems(rows)(points)
            return scale * value, scale * gradient

        return objective

    return of


def called(matrix: Tensor, start: Tensor, *, calls: int) -> tuple[float, int]:
    """Return the lowest value so many calls of torch.optim.LBFGS see, and how often they look."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point])
    seen = []

    def closure() -> float:
        optimizer.zero_grad()
        value = value_of(point, matrix)
        value.backward()
        seen.append(value.item())
        return value.item()

    for _ in range(calls):
        optimizer.step(closure)
    seen.append(value_of(point.detach(), matrix).item())  # where the last step led
    return min(seen), len(seen)


def torch_alone(matrix: Tensor, start: Tensor, *, iterations: int) -> tuple[Tensor, float]:
    """Return the lowest point torch.optim.LBFGS sees in so many steps."""
    point = start.clone().requires_grad_()
    seen: list[tuple[float, Tensor]] = []
    optimizer = torch.optim.LBFGS([point], max_iter=iterations + 1, max_eval=iterations + 1)

    def closure() -> float:
        optimizer.zero_grad()
        value = value_of(point, matrix)
        value.backward()
        seen.append((value.item(), point.detach().clone()))
        return value.item()

    optimizer.step(closure)
    assert len(seen) == iterations + 1
    value, best = min(seen, key=lambda pair: pair[0])
    return best, value


@pytest.mark.parametrize("iterations", [1, 2, 5, 10])
def test_unguarded_iterations_are_those_of_torch_one_problem_at_a_time(iterations: int) -> None:
    matrices, starts = curved()
    end = minimise(problems_of(matrices), starts, Lbfgs(iterations=iterations, guard=False))
    for row in range(len(starts)):
        point, value = torch_alone(matrices[row], starts[row], iterations=iterations)
        torch.testing.assert_close(end.point[row], point, rtol=0, atol=1e-9)
        assert end.value[row].item() == pytest.approx(value, rel=1e-9)
        assert end.evaluations[row] == iterations + 1


def test_a_short_history_forgets_as_torch_does() -> None:
    matrices, starts = curved()
    settings = Lbfgs(iterations=8, guard=False, history=2)
    end = minimise(problems_of(matrices), starts, settings)
    point = starts[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=9, max_eval=9, history_size=2)
    seen = []

    def closure() -> float:
        optimizer.zero_grad()
        value = value_of(point, matrices[0])
        value.backward()
        seen.append(value.item())
        return value.item()

    optimizer.step(closure)
    assert end.value[0].item() == pytest.approx(min(seen), rel=1e-9)


@pytest.mark.parametrize("guard", [True, False])
def test_a_poisoned_problem_disturbs_no_neighbour(guard: bool) -> None:
    matrices, starts = curved(5)
    settings = Lbfgs(iterations=40, guard=guard)
    sound = minimise(problems_of(matrices), starts, settings)
    poisoned = matrices.clone()
    poisoned[2] = torch.nan
    end = minimise(problems_of(poisoned), starts, settings)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(end.point[others], sound.point[others])
    assert torch.equal(end.value[others], sound.value[others])
    assert end.failed.tolist() == [False, False, True, False, False]
    assert end.value[2] == torch.inf
    assert torch.equal(end.point[2], starts[2])


def test_guarded_search_survives_a_wall_that_stops_the_unguarded_one() -> None:
    def of(rows: Tensor) -> Objective:
        def objective(points: Tensor) -> tuple[Tensor, Tensor]:
            x = points[:, 0]  # x - log(x): infinite at 0, undefined below, lowest at 1
            return x - x.log(), (1 - 1 / x)[:, None]

        return objective

    start = torch.tensor([[30.0], [8.0]], dtype=torch.float64)
    guarded = minimise(of, start, Lbfgs(iterations=60))
    torch.testing.assert_close(guarded.point, torch.ones_like(start), rtol=0, atol=1e-6)
    assert not guarded.failed.any()
    unguarded = minimise(of, start, Lbfgs(iterations=60, guard=False))
    assert unguarded.failed.any()
    assert unguarded.value.isfinite().all()  # frozen where it was last finite


def test_problems_that_are_done_leave_the_stack_and_keep_their_ends() -> None:
    matrices, starts = curved(40)
    widths = []

    def watched(rows: Tensor) -> Objective:
        widths.append(len(rows))
        return problems_of(matrices)(rows)

    starts[:30] = minimise(problems_of(matrices), starts, Lbfgs(iterations=300)).point[:30]
    end = minimise(watched, starts, Lbfgs(iterations=300, patience=5))
    assert widths[0] == 40
    assert widths[-1] < 40
    assert all(width % 8 == 0 for width in widths)
    lowest = minimise(problems_of(matrices), starts, Lbfgs(iterations=300)).value
    torch.testing.assert_close(end.value, lowest, rtol=1e-2, atol=1e-6)


def test_limits_end_a_problem() -> None:
    matrices, starts = curved()
    before = starts.clone()
    enough = minimise(problems_of(matrices), starts, Lbfgs(good_enough=1.0))
    assert enough.evaluations.tolist() == [1, 1, 1]
    flat = minimise(problems_of(matrices), starts, Lbfgs(tolerance=1.0))
    assert flat.evaluations.tolist() == [1, 1, 1]
    assert torch.equal(starts, before)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_a_small_objective_is_minimised_like_a_large_one(scale: float) -> None:
    matrices, starts = curved()
    lowest = minimise(problems_of(matrices), starts, Lbfgs(iterations=500)).point
    end = minimise(scaled(problems_of(matrices), scale), starts, Lbfgs(iterations=500))
    torch.testing.assert_close(end.point, lowest, rtol=0, atol=1e-5)
    assert not end.on_budget.any()


def test_tolerance_and_good_enough_are_shares_of_the_first_gradient_and_value() -> None:
    matrices, starts = curved()
    problems = problems_of(matrices)
    value, gradient = problems(torch.arange(3))(starts)
    first = gradient.abs().amax(-1)
    ends = [minimise(problems, starts, Lbfgs(tolerance=share)) for share in (1e-1, 1e-6)]
    for end, share in zip(ends, (1e-1, 1e-6), strict=True):
        assert (end.evaluations > 1).all()
        assert not end.on_budget.any()
        _, left = problems(torch.arange(3))(end.point)
        assert (left.abs().amax(-1) <= 2 * share * first).all()  # the lowest point, not the last
    assert (ends[0].evaluations < ends[1].evaluations).all()
    half = minimise(problems, starts, Lbfgs(good_enough=0.5))
    assert (half.value <= 0.5 * value).all()
    assert (half.evaluations < ends[1].evaluations).all()


@pytest.mark.parametrize("guard", [True, False])
def test_a_budget_that_stopped_nothing_changes_nothing_when_it_is_doubled(guard: bool) -> None:
    matrices, starts = curved()
    few = minimise(problems_of(matrices), starts, Lbfgs(iterations=5, guard=guard))
    assert few.on_budget.all()
    assert few.evaluations.tolist() == [6, 6, 6]
    enough = minimise(problems_of(matrices), starts, Lbfgs(iterations=400, guard=guard))
    assert not enough.on_budget.any()
    twice = minimise(problems_of(matrices), starts, Lbfgs(iterations=800, guard=guard))
    assert torch.equal(enough.point, twice.point)
    assert torch.equal(enough.evaluations, twice.evaluations)


@pytest.mark.parametrize("calls", [2, 3, 8])
def test_a_step_under_torchs_tolerance_ends_one_call_and_not_the_search(calls: int) -> None:
    matrices, starts = curved()
    unit = 1e-9  # of a point: no step is larger than torch's tolerance, and every call takes one
    matrices = matrices * torch.logspace(0, -1, SIZE, dtype=torch.float64) / unit
    settings = Lbfgs(iterations=20 * calls, guard=False)
    end = minimise(problems_of(matrices), unit * starts, settings)
    for row, start in enumerate(starts):
        value, looks = called(matrices[row], unit * start, calls=calls)
        assert end.value[row].item() == pytest.approx(value, rel=1e-3)
        # A call of torch's begins with a look at where the last one ended.
        assert end.evaluations[row] == looks - calls
    assert not end.on_budget.any()


def test_a_slope_under_torchs_tolerance_moves_nothing() -> None:
    matrices, starts = curved()
    end = minimise(scaled(problems_of(matrices), 1e-7), starts, Lbfgs(guard=False))
    flat = (1e-7 * problems_of(matrices)(torch.arange(3))(starts)[1]).square().sum(-1) < 1e-9
    assert flat.any()
    assert torch.equal(end.point[flat], starts[flat])
    assert (end.evaluations[flat] == 1).all()
