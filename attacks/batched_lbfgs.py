"""L-BFGS over many independent problems at once: one stacked evaluation per iteration.

Every problem keeps its own history, step length and stopping state, so it ends where it would end
alone; one whose objective stops being finite is frozen where it was last finite and cannot disturb
the others. `guard = False` is `torch.optim.LBFGS` without a line search (unit steps, the first one
scaled by the gradient's 1-norm); `guard = True` takes only steps that lower the objective enough
and shortens the others.

Source: Jorge Nocedal, Stephen Wright, *Numerical Optimization*, 2nd edition, Springer 2006,
algorithms 7.4 and 3.1, https://doi.org/10.1007/978-0-387-40065-5; for the unguarded form
https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html

Departures:
- A skipped curvature pair or a refused step leaves an empty slot in the history.
- The lowest point seen is returned, not the last.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a stack of points (rows x size) to their values (rows) and gradients (rows x size)."""

Problems = Callable[[Tensor], Objective]
"""From the numbers of some problems to their objective: row i of its stack is problem number i."""

CURVATURE_FLOOR = 1e-10  # torch.optim.LBFGS: a pair with less curvature is skipped
SUFFICIENT_DECREASE = 1e-4  # Armijo's condition, Nocedal and Wright's customary constant
SHORTEST_STEP = 1e-6  # shorter ones mean that the direction is no good, not that the step is long
WORTHWHILE = 0.999  # patience counts from the last time the best value fell below this share
WIDTH = 8  # rows are padded to multiples of this, so that kernels round every row alike


@dataclass(frozen=True, kw_only=True)
class Lbfgs:
    """Settings of the optimiser.

    Attributes:
        iterations: Most evaluations of a problem after its first.
        history: Curvature pairs kept.
        learning_rate: Length of a full step.
        gradient_tolerance: A problem ends when no entry of its gradient is larger.
        change_tolerance: An unguarded problem ends when its slope or its step is no larger.
        good_enough: A problem ends when its objective is no higher.
        patience: A problem ends when so many evaluations have not lowered its best value by a
            thousandth; ``None`` never ends it.
        guard: Take only steps that lower the objective.
    """

    iterations: int = 4000
    history: int = 100
    learning_rate: float = 1.0
    gradient_tolerance: float = 1e-7
    change_tolerance: float = 1e-9
    good_enough: float = 0.0
    patience: int | None = None
    guard: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Minimum:
    """Where each problem ended.

    Attributes:
        point: The lowest point seen.
        value: The objective there; infinite where it never was finite.
        failed: Problems stopped by a value or gradient that was not finite.
        evaluations: How often each was evaluated.
    """

    point: Float[Tensor, " problems size"]
    value: Float[Tensor, " problems"]
    failed: Bool[Tensor, " problems"]
    evaluations: Int[Tensor, " problems"]


def minimise(
    problems: Problems, start: Float[Tensor, " problems size"], settings: Lbfgs
) -> Minimum:
    """Minimise every problem from its own start.

    Args:
        problems: What to minimise, for any choice of problems.
        start: One starting point per problem; not changed.
        settings: The same for all problems.

    Returns:
        The lowest point of each problem.
    """
    run = _Run(problems, start, settings)
    for iteration in range(settings.iterations):
        if not run.running.any():
            break
        if 2 * int(run.running.sum()) <= len(run.running) > WIDTH:
            run.shed()
        run.advance(iteration % settings.history)
    return Minimum(
        point=run.best_point,
        value=run.best_value,
        failed=run.failed,
        evaluations=run.evaluations,
    )


class _Run:
    """The working state of one call of :func:`minimise`: one row per problem still running."""

    def __init__(self, problems: Problems, start: Tensor, settings: Lbfgs) -> None:
        count, size = start.shape
        self.problems, self.settings = problems, settings
        self.best_point = start.clone()
        self.best_value = start.new_full((count,), torch.inf)
        self.failed = torch.zeros(count, dtype=torch.bool, device=start.device)
        self.evaluations = torch.zeros(count, dtype=torch.long, device=start.device)
        self.problem = _padded(torch.arange(count, device=start.device))
        rows = len(self.problem)
        self.running = torch.arange(rows, device=start.device) < count
        self.point = start[self.problem]
        self.objective = problems(self.problem)
        self.value, self.gradient = self.objective(self.point)
        self.steps = start.new_zeros(settings.history, rows, size)
        self.bends = torch.zeros_like(self.steps)
        self.inverse_curvature = start.new_zeros(settings.history, rows)
        self.scale = start.new_ones(rows)
        self.patience = start.new_zeros(rows)
        self.goal = start.new_full((rows,), torch.inf)
        self.filled = 0
        self._record(self.point, self.value, self.gradient)
        self.steepest = torch.ones_like(self.running)
        self.direction = -self.gradient
        self.length = self._first_length()
        self.slope = (self.gradient * self.direction).sum(-1)

    def shed(self) -> None:
        """Drop the rows that no longer run, down to a multiple of the width."""
        rows = _padded(torch.nonzero(self.running).squeeze(1))
        alive = self.running.sum()
        for name in ("problem", "point", "value", "gradient", "direction", "length", "slope"):
            setattr(self, name, getattr(self, name)[rows])
        for name in ("scale", "patience", "goal", "steepest"):
            setattr(self, name, getattr(self, name)[rows])
        for name in ("steps", "bends", "inverse_curvature"):
            setattr(self, name, getattr(self, name)[:, rows])
        self.running = torch.arange(len(rows), device=rows.device) < alive
        self.objective = self.problems(self.problem)

    def advance(self, slot: int) -> None:
        """Evaluate every row once, then take its step or shorten it.

        Args:
            slot: Where in the history this iteration's curvature pair goes.
        """
        step = self.length[:, None] * self.direction
        trial = self.point + step
        value, gradient = self.objective(trial)
        self._record(trial, value, gradient)
        taken = self.running
        if self.settings.guard:
            enough = self.value + SUFFICIENT_DECREASE * self.length * self.slope
            taken = taken & (value <= enough) & _finite(value, gradient)
        self._remember(slot, taken, step, gradient - self.gradient)
        self.point = torch.where(taken[:, None], trial, self.point)
        self.gradient = torch.where(taken[:, None], gradient, self.gradient)
        refused_value, self.value = value, torch.where(taken, value, self.value)
        self._redirect(slot, taken, refused_value)

    def _record(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Keep the best points seen, and end the problems that are done or broken."""
        rows = self.running
        finite = _finite(value, gradient)
        best = self.best_value[self.problem]
        better = rows & finite & (value < best)
        self.best_point[self.problem[better]] = point[better]
        self.best_value[self.problem[better]] = value[better]
        self.evaluations[self.problem[rows]] += 1
        if not self.settings.guard or self.filled == 0:
            self.failed[self.problem[rows & ~finite]] = True
            self.running = self.running & finite
        done = value <= self.settings.good_enough
        done |= gradient.abs().amax(-1) <= self.settings.gradient_tolerance
        worthwhile = value < WORTHWHILE * self.goal
        self.goal = torch.where(worthwhile, value, self.goal)
        self.patience = torch.where(worthwhile, 0, self.patience + 1)
        if self.settings.patience is not None:
            done |= self.patience > self.settings.patience
        self.running = self.running & ~done

    def _remember(self, slot: int, taken: Tensor, step: Tensor, bend: Tensor) -> None:
        """Store the curvature pair of every row that moved and saw enough curvature."""
        curvature = (step * bend).sum(-1)
        kept = taken & (curvature > CURVATURE_FLOOR)
        self.steps[slot] = torch.where(kept[:, None], step, 0)
        self.bends[slot] = torch.where(kept[:, None], bend, 0)
        self.inverse_curvature[slot] = torch.where(kept, 1 / curvature, 0)
        self.scale = torch.where(kept, curvature / bend.square().sum(-1), self.scale)
        self.filled = max(self.filled, slot + 1)

    def _redirect(self, slot: int, taken: Tensor, refused_value: Tensor) -> None:
        """Choose the next direction and length of every row."""
        direction = self._quasi_newton(slot)
        self.direction = torch.where(taken[:, None], direction, self.direction)
        self.slope = (self.gradient * self.direction).sum(-1)
        full = torch.full_like(self.length, self.settings.learning_rate)
        if not self.settings.guard:
            self.length = full
            small = (full[:, None] * self.direction).abs().amax(-1)
            flat = self.slope > -self.settings.change_tolerance
            self.running = self.running & ~flat & (small > self.settings.change_tolerance)
            return
        # The minimum of the parabola through the old value, the old slope and the refused value.
        excess = refused_value - self.value - self.slope * self.length
        fitted = -0.5 * self.slope * self.length.square() / excess
        shorter = fitted.clamp(0.1 * self.length, 0.5 * self.length).nan_to_num(0.1)
        self.length = torch.where(taken, full, torch.minimum(shorter, 0.5 * self.length))
        self.steepest = self.steepest & ~taken
        self._give_up_or_restart()

    def _give_up_or_restart(self) -> None:
        """Forget the history of rows whose direction is no good; end those that had none."""
        hopeless = (self.slope >= 0) | (self.length < SHORTEST_STEP)
        hopeless &= ~self.steepest | (self.length < SHORTEST_STEP * self._first_length())
        self.running = self.running & ~(hopeless & self.steepest)
        if not bool(hopeless.any()):
            return
        self.inverse_curvature[:, hopeless] = 0
        self.scale = torch.where(hopeless, 1, self.scale)
        self.direction = torch.where(hopeless[:, None], -self.gradient, self.direction)
        self.slope = (self.gradient * self.direction).sum(-1)
        self.length = torch.where(hopeless, self._first_length(), self.length)
        self.steepest = self.steepest | hopeless

    def _quasi_newton(self, newest: int) -> Tensor:
        """Return minus the approximate inverse Hessian times the gradient (algorithm 7.4)."""
        slots = [(newest - back) % self.filled for back in range(self.filled)]
        weights: dict[int, Tensor] = {}
        vector = -self.gradient
        for slot in slots:
            weights[slot] = self.inverse_curvature[slot] * (self.steps[slot] * vector).sum(-1)
            vector = vector - weights[slot][:, None] * self.bends[slot]
        vector = vector * self.scale[:, None]
        for slot in reversed(slots):
            share = self.inverse_curvature[slot] * (self.bends[slot] * vector).sum(-1)
            vector = vector + (weights[slot] - share)[:, None] * self.steps[slot]
        return vector

    def _first_length(self) -> Tensor:
        """Return how far to go along a gradient of unknown scale, as torch.optim.LBFGS does."""
        return self.settings.learning_rate * (1 / self.gradient.abs().sum(-1)).clamp(max=1.0)


def _finite(value: Tensor, gradient: Tensor) -> Tensor:
    return value.isfinite() & gradient.isfinite().all(-1)


def _padded(rows: Tensor) -> Tensor:
    """Fill up to a multiple of the width by repeating the first row."""
    lacking = -len(rows) % WIDTH
    return torch.cat([rows, rows[:1].expand(lacking)])
