"""L-BFGS and Adam over many independent problems at once: one stacked evaluation per iteration.

**L-BFGS.** Every problem keeps its own history, step length and stopping state, so it ends where it
would end alone; one whose objective stops being finite is frozen where it was last finite and
cannot disturb the others. `guard = False` is `torch.optim.LBFGS` without a line search (unit steps,
the first one scaled by the gradient's 1-norm); `guard = True` takes only steps that lower the
objective enough and shortens the others.

Source: Jorge Nocedal, Stephen Wright, *Numerical Optimization*, 2nd edition, Springer 2006,
algorithms 7.4 and 3.1, https://doi.org/10.1007/978-0-387-40065-5; for the unguarded form
https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html

Where a guarded problem stops is relative to its first gradient and its first value, since nobody
knows their scale beforehand. The unguarded form has torch's own absolute tolerances, and is called
as papers call it: many `.step`s of at most 20 iterations. A step or a change of the objective under
the tolerance ends one call, and the next one goes on from the same history.

The direction is the compact form of the same matrix (Nocedal and Wright, equation 7.24): two
products with the whole history and two triangular systems of its size, where algorithm 7.4 goes
through the history one pair at a time. On a GPU an iteration waits for nothing; whether any
problem is left is looked at in every tenth one.

Departures:
- A skipped curvature pair or a refused step leaves an empty slot in the history.
- The lowest point seen is returned, not the last.
- An earlier version (until 2026-11-29) went through the pairs; directions differ from its in the
  last bits, and so may, after many iterations, the points.

**Adam** works entry by entry, so a stack of problems ends exactly where each would end alone; a
problem whose objective stops being finite is frozen and the lowest point it saw is kept.

Source: Diederik Kingma, Jimmy Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015,
https://arxiv.org/abs/1412.6980

A problem that runs to the end of its budget stopped on it if its best value still fell by more than
a hundredth during the last tenth. Departure: the lowest point seen is returned, not the last.
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
TOLERANCE = 1e-12  # of float64's 2e-16: rounding ends most problems before
CALL = 20  # torch.optim.LBFGS: iterations of one `.step`
TORCH_TOLERANCE = 1e-7  # torch.optim.LBFGS: tolerance_grad, absolute
CHANGE = 1e-2  # torch.optim.LBFGS: tolerance_change is a hundredth of tolerance_grad
LOOK = 10  # iterations between two looks at a GPU for problems that are left
WIDTH = 8  # rows are padded to multiples of this, so that kernels round every row alike


@dataclass(frozen=True, kw_only=True)
class Lbfgs:
    """Settings of the optimiser.

    Attributes:
        iterations: Most evaluations of a problem after its first.
        history: Curvature pairs kept.
        learning_rate: Length of a full step.
        tolerance: A guarded problem ends when no entry of its gradient is larger than this share of
            the largest entry of its first one; ``None`` is 1e-12. Unguarded it is torch's
            ``tolerance_grad``, absolute, and ``None`` is 1e-7; a hundredth of it is torch's
            ``tolerance_change``.
        good_enough: A problem ends when its objective is no higher than this share of its first.
        patience: A problem ends when so many evaluations have not lowered its best value by a
            thousandth; ``None`` never ends it.
        guard: Take only steps that lower the objective.
    """

    iterations: int = 4000
    history: int = 100
    learning_rate: float = 1.0
    tolerance: float | None = None
    good_enough: float = 0.0
    patience: int | None = None
    guard: bool = True

    @property
    def least_gradient(self) -> float:
        """The tolerance, or what ``None`` stands for."""
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCE if self.guard else TORCH_TOLERANCE


@dataclass(frozen=True, kw_only=True, eq=False)
class Minimum:
    """Where each problem ended.

    Attributes:
        point: The lowest point seen.
        value: The objective there; infinite where it never was finite.
        failed: Problems stopped by a value or gradient that was not finite.
        evaluations: How often each was evaluated.
        on_budget: Problems that would have gone on with more iterations.
    """

    point: Float[Tensor, " problems size"]
    value: Float[Tensor, " problems"]
    failed: Bool[Tensor, " problems"]
    evaluations: Int[Tensor, " problems"]
    on_budget: Bool[Tensor, " problems"]


def minimise(
    problems: Problems,
    start: Float[Tensor, " problems size"],
    settings: Lbfgs,
    *,
    enough: Float[Tensor, " problems"] | None = None,
) -> Minimum:
    """Minimise every problem from its own start.

    Args:
        problems: What to minimise, for any choice of problems.
        start: One starting point per problem; not changed.
        settings: The same for all problems.
        enough: Values at which each problem ends, whatever share of its first they are.

    Returns:
        The lowest point of each problem.
    """
    run = _Run(problems, start, settings, enough)
    look = 1 if start.device.type == "cpu" else LOOK
    for iteration in range(settings.iterations):
        if iteration % look == 0:
            left = int(run.running.sum())
            if not left:
                break
            if 2 * left <= len(run.running) > WIDTH:
                run.shed(left)
        run.advance(iteration % settings.history)
    run.settle()
    return Minimum(
        point=run.settled["best_point"],
        value=run.settled["best_value"],
        failed=run.settled["failed"],
        evaluations=run.settled["evaluations"],
        on_budget=run.settled["on_budget"],
    )


_FOUND = ("best_point", "best_value", "failed", "evaluations", "on_budget")
_STATE = (
    *("problem", "point", "value", "gradient", "direction", "length", "slope", "scale", "patience"),
    *("goal", "steepest", "flat", "enough", "spent", "pairs", "products", "kept"),
)


class _Run:
    """The working state of one call of :func:`minimise`: one row per problem still running."""

    def __init__(
        self, problems: Problems, start: Tensor, settings: Lbfgs, enough: Tensor | None
    ) -> None:
        count, size = start.shape
        self.problems, self.settings = problems, settings
        self.problem = _padded(torch.arange(count, device=start.device))
        self.rows, rows = count, len(self.problem)
        self.running = torch.arange(rows, device=start.device) < count
        self.point = start[self.problem]
        self.best_point = self.point.clone()
        self.best_value = start.new_full((rows,), torch.inf)
        self.failed = torch.zeros_like(self.running)
        self.on_budget = torch.zeros_like(self.running)
        self.evaluations = torch.zeros_like(self.problem)
        self.settled = {name: getattr(self, name)[:count].clone() for name in _FOUND}
        self.objective = problems(self.problem)
        self.value, self.gradient = self.objective(self.point)
        self.flat = settings.least_gradient * (
            self.gradient.abs().amax(-1) if settings.guard else torch.ones_like(self.value)
        )
        self.enough = settings.good_enough * self.value
        if enough is not None:
            self.enough = torch.maximum(self.enough, enough[self.problem])
        self.spent = torch.zeros_like(self.problem)
        # Steps and bends, by slot, each over the root of their inner product; and the products of
        # both (first axis of two) with the bends.
        self.pairs = start.new_zeros(rows, settings.history, 2, size)
        self.products = start.new_zeros(rows, settings.history, 2, settings.history)
        self.kept = start.new_zeros(rows, settings.history)
        self.scale = start.new_ones(rows)
        self.patience = start.new_zeros(rows)
        self.goal = start.new_full((rows,), torch.inf)
        self.filled = 0
        self._record(self.point, self.value, self.gradient)
        self.steepest = torch.ones_like(self.running)
        self.direction = -self.gradient
        self.length = self._first_length()
        self.slope = (self.gradient * self.direction).sum(-1)
        self._end_flat()

    def settle(self) -> None:
        """Write down what was found of every problem that still has a row."""
        for name in _FOUND:
            found = getattr(self, name)[: self.rows]
            self.settled[name].index_copy_(0, self.problem[: self.rows], found)

    def shed(self, left: int) -> None:
        """Drop the rows that no longer run, down to a multiple of the width."""
        self.settle()
        rows = _padded(torch.nonzero(self.running).squeeze(1))
        for name in (*_FOUND, *_STATE):
            setattr(self, name, getattr(self, name)[rows])
        self.rows = left
        self.running = torch.arange(len(rows), device=rows.device) < left
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
        before, self.value = self.value, torch.where(taken, value, self.value)
        self.spent = self.spent + 1
        cut_short = torch.zeros_like(taken)
        if not self.settings.guard:
            change = (value - before).abs()
            cut_short = self._end_call(step.abs().amax(-1), change)
        self._redirect(slot, taken, value)
        over = self.running & (self.spent >= self.settings.iterations)
        self.on_budget = self.on_budget | (over & ~cut_short)
        self.running = self.running & ~over

    def _end_call(self, step: Tensor, change: Tensor) -> Bool[Tensor, " rows"]:
        """Take from the budget what torch leaves of a call that a tolerance ends; say of which."""
        least = CHANGE * self.settings.least_gradient
        small = ((step <= least) | (change < least)) & (self.spent % CALL != 0)
        self.spent = torch.where(small, self.spent + -self.spent % CALL, self.spent)
        return small

    def _end_flat(self) -> None:
        """End the unguarded rows whose slope is so small that torch never moves again."""
        if not self.settings.guard:
            least = CHANGE * self.settings.least_gradient
            self.running = self.running & (self.slope <= -least)

    def _record(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Keep the best points seen, and end the problems that are done or broken."""
        rows = self.running
        finite = _finite(value, gradient)
        better = rows & finite & (value < self.best_value)
        self.best_point = torch.where(better[:, None], point, self.best_point)
        self.best_value = torch.where(better, value, self.best_value)
        self.evaluations = self.evaluations + rows
        if not self.settings.guard or self.filled == 0:
            self.failed = self.failed | (rows & ~finite)
            self.running = self.running & finite
        done = (value <= self.enough) | (gradient.abs().amax(-1) <= self.flat)
        worthwhile = value < WORTHWHILE * self.goal
        self.goal = torch.where(worthwhile, value, self.goal)
        self.patience = torch.where(worthwhile, 0, self.patience + 1)
        if self.settings.patience is not None:
            done |= self.patience > self.settings.patience
        self.running = self.running & ~done

    def _remember(self, slot: int, taken: Tensor, step: Tensor, bend: Tensor) -> None:
        """Store the curvature pair of every row that moved and saw enough curvature."""
        curvature = (step * bend).sum(-1)
        floor = torch.full_like(curvature, CURVATURE_FLOOR)
        if self.settings.guard:  # an absolute floor would end the learning at low objectives
            floor = floor * step.norm(dim=-1) * bend.norm(dim=-1)
        kept = taken & (curvature > floor)
        pair = torch.stack([step, bend], 1) / curvature.sqrt()[:, None, None]
        self.pairs[:, slot] = torch.where(kept[:, None, None], pair, 0)
        self.kept[:, slot] = kept.to(self.kept.dtype)
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
            self._end_flat()
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
        # Products among forgotten pairs may stay: no later pair has one with them.
        self.kept = torch.where(hopeless[:, None], 0, self.kept)
        self.scale = torch.where(hopeless, 1, self.scale)
        self.direction = torch.where(hopeless[:, None], -self.gradient, self.direction)
        self.slope = (self.gradient * self.direction).sum(-1)
        self.length = torch.where(hopeless, self._first_length(), self.length)
        self.steepest = self.steepest | hopeless

    def _quasi_newton(self, newest: int) -> Tensor:
        """Return minus the approximate inverse Hessian times the gradient (equation 7.24).

        With pairs scaled as they are here the equation's D is the identity, and its triangular R
        has ones on its diagonal, also where a slot is empty.
        """
        history = self.pairs[:, : self.filled].flatten(1, 2)
        bend = self.pairs[:, newest, 1]
        along = history @ torch.stack([self.gradient, bend], -1)
        along = along.unflatten(1, (-1, 2)) * self.kept[:, : self.filled, None, None]
        self.products[:, : self.filled, :, newest] = along[..., 1]
        self.products[:, newest, 1, : self.filled] = along[:, :, 1, 1]
        turn = newest + 1  # slots in the order of time begin behind the newest
        products = self.products[:, : self.filled, :, : self.filled].roll((-turn, -turn), (1, 3))
        steps, bends = along[..., 0].roll(-turn, 1).unsqueeze(-1).unbind(2)
        upper, scale = products[:, :, 0], self.scale[:, None, None]
        solve = torch.linalg.solve_triangular
        inner = solve(upper, steps, upper=True, unitriangular=True)
        outer = inner + scale * (products[:, :, 1] @ inner - bends)
        outer = solve(upper.mT, outer, upper=False, unitriangular=True)
        weights = torch.stack([-outer, scale * inner], 2).roll(turn, 1).flatten(1)
        moved = (weights[:, None] @ history).squeeze(1)
        return torch.addcmul(moved, self.gradient, self.scale[:, None], value=-1)

    def _first_length(self) -> Tensor:
        """Return how far to go along a gradient of unknown scale, as torch.optim.LBFGS does."""
        return self.settings.learning_rate * (1 / self.gradient.abs().sum(-1)).clamp(max=1.0)


def _finite(value: Tensor, gradient: Tensor) -> Tensor:
    return value.isfinite() & gradient.isfinite().all(-1)


def _padded(rows: Tensor) -> Tensor:
    """Fill up to a multiple of the width by repeating the first row."""
    lacking = -len(rows) % WIDTH
    return torch.cat([rows, rows[:1].expand(lacking)])


STILL_FALLING = 0.99  # the share of its value that a problem must go below in the last tenth
FIRST_DECAY, SECOND_DECAY, STABILISER = 0.9, 0.999, 1e-8  # the paper's, section 2


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Settings of the optimiser.

    Attributes:
        iterations: Steps of each problem.
        learning_rate: Length of a step.
        good_enough: A problem ends when its objective is no higher than this share of its first.
    """

    iterations: int = 5000
    learning_rate: float = 0.1
    good_enough: float = 0.0


def descend(
    problems: Problems,
    start: Float[Tensor, " problems size"],
    settings: Adam,
    *,
    enough: Float[Tensor, " problems"] | None = None,
) -> Minimum:
    """Minimise every problem from its own start.

    Args:
        problems: What to minimise, for any choice of problems.
        start: One starting point per problem; not changed.
        settings: The same for all problems.
        enough: Values at which each problem ends, whatever share of its first they are.

    Returns:
        The lowest point of each problem.
    """
    problem = torch.arange(len(start), device=start.device)
    objective = problems(problem)
    point, best_point = start, start.clone()
    best_value = start.new_full((len(start),), torch.inf)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    failed = torch.zeros_like(problem, dtype=torch.bool)
    running, evaluations = ~failed, torch.zeros_like(problem)
    least, earlier = torch.zeros_like(best_value) if enough is None else enough, best_value
    for iteration in range(1, settings.iterations + 2):
        value, gradient = objective(point)
        evaluations = evaluations + running
        finite = value.isfinite() & gradient.isfinite().all(-1)
        failed = failed | (running & ~finite)
        running = running & finite
        better = running & (value < best_value)
        best_point = torch.where(better[:, None], point, best_point)
        best_value = torch.where(better, value, best_value)
        if iteration == 1:
            least = torch.maximum(least, settings.good_enough * value)
        if iteration <= settings.iterations + 1 - max(settings.iterations // 10, 1):
            earlier = best_value
        running = running & (value > least)
        if not bool(running.any()):
            break
        first = first.lerp(gradient, 1 - FIRST_DECAY)
        second = second.lerp(gradient.square(), 1 - SECOND_DECAY)
        spread = (second / (1 - SECOND_DECAY**iteration)).sqrt() + STABILISER
        step = settings.learning_rate / (1 - FIRST_DECAY**iteration) * first / spread
        point = torch.where(running[:, None], point - step, point)
    return Minimum(
        point=best_point,
        value=best_value,
        failed=failed,
        evaluations=evaluations,
        on_budget=running & (best_value < STILL_FALLING * earlier),
    )
