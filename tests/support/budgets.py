"""Whether more budget would have changed the scores of an attack that does not say so."""

from collections.abc import Callable, Iterable

from torch import Tensor

from experiments.results.cards import BUDGET_BOUND
from leakbed.contracts import Guess
from leakbed.oracle.metrics import abs_pearson

ROUNDING = 1e-6  # of a correlation: images that differ by less are the same image


def unbound(attacked: Callable[[int], Guess], budgets: Iterable[int]) -> int:
    """Return the first budget whose guess is not budget-bound, as a card counts it."""
    for budget in budgets:
        stopped = attacked(budget).stopped_on_budget
        assert stopped is not None
        if stopped.double().mean() <= BUDGET_BOUND:
            return budget
    raise AssertionError("every budget was too small")


def correlations(guess: Guess, private: Tensor) -> Tensor:
    """Return the correlation of every target's first image."""
    assert guess.images is not None
    return abs_pearson(guess.images[:, 0].clamp(0, 1), private)


def assert_doubling_changes_little(
    attacked: Callable[[int], Guess], private: Tensor, *, budget: int
) -> None:
    """Compare the mean at a budget and at its double: they differ by under two standard errors."""
    once, twice = (correlations(attacked(each), private) for each in (budget, 2 * budget))
    error = once.std() / len(once) ** 0.5
    assert (once.mean() - twice.mean()).abs() < 2 * error + ROUNDING
